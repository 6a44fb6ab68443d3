"""Groups of earlier steps that take the place of dead ones.

A group whose rewards are all equal has no policy gradient. With a buffer, a group with one, sampled some steps ago, is
trained on instead. It keeps the log-probs of the policy that sampled it, so that its ratios say how far the policy has
moved since.
"""

from __future__ import annotations

import random
from collections import deque

import torch

from vidreason.lightning_modules.grpo_parts import Part
from vidreason.lightning_modules.vlms.base import VLM


class ReplayBuffer:
    """The latest groups of this rank that had an advantage, on the CPU; checkpoints hold them.

    Args:
        capacity: Groups that are kept; each holds its prompt with the video's pixels.
        seed: Of the draws.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.seed = seed
        self.groups: deque[Part] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self.groups)

    def refresh(self, part: Part, vlm: VLM, step: int, number: int) -> list[Part]:
        """Replaces dead groups as far as there are others, and remembers the live ones.

        What stands for a clip that counts nothing is neither: in its place another clip would count.

        Args:
            part: Of the current step, with ``old_logprobs``.
            vlm: The family that encoded the prompts.
            step: Optimizer step; with ``seed`` and ``number`` it fixes the draw.
            number: Of the part within its step.

        Returns:
            The part without the groups that were replaced, where any is left, then one part per group drawn.
        """
        assert part.old_logprobs is not None, "a group is replayed with the log-probs of the policy that sampled it"
        rows = range(len(part.groups))
        alive, weighed = part.advantages.view(len(part.groups), -1).ne(0).any(dim=1).tolist(), part.weighed_groups
        dead = [row for row in rows if weighed[row] and not alive[row]]
        draw = random.Random(f"{self.seed}/{step}/{number}")
        drawn = draw.sample(list(self.groups), min(len(dead), len(self.groups)))
        self.groups.extend(part.take(vlm, [row]).to("cpu") for row in rows if alive[row])
        if not drawn:
            return [part]
        kept = [row for row in rows if row not in dead[: len(drawn)]]
        device: torch.device = part.advantages.device
        return [*([part.take(vlm, kept)] if kept else []), *(group.to(device) for group in drawn)]
