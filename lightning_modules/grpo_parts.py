"""The parts of a GRPO step: the rollouts of some prompts, as many as go through the model at once.

Shape letters: B prompts of a step, G completions per prompt, n completions of a part, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from vidreason.lightning_modules.functional.aggregation import StepCounts
from vidreason.lightning_modules.rollout import CompletionBatch, RolloutGroup
from vidreason.lightning_modules.vlms.base import VLM

T = TypeVar("T")


@dataclass(frozen=True)
class Rolled:
    """Completions of some prompts and their rewards."""

    batch: CompletionBatch
    groups: tuple[RolloutGroup, ...]


@dataclass(frozen=True)
class Part:
    """The rollouts of some prompts of a step: as many as go through the model at once."""

    batch: CompletionBatch
    groups: tuple[RolloutGroup, ...]
    advantages: Tensor
    """[n] one per completion"""
    old_logprobs: Tensor | None = None
    """[n, L]; None where the update's own forward gives them"""
    ref_logprobs: Tensor | None = None
    """[n, L]; None without ``kl_coef``"""
    completion_mask: Tensor | None = None
    """[n, L] bool, tokens that count in the loss; None: every sampled token"""
    weighed: Tensor | None = None
    """[n] bool, completions that are counted, with or without a token that counts; None: all"""

    @property
    def counted(self) -> Tensor:
        """[n, L] bool, tokens that count in the loss."""
        return self.batch.texts.loss_mask if self.completion_mask is None else self.completion_mask

    @property
    def weighed_groups(self) -> list[bool]:
        """Whether the clip of each group counts."""
        size = len(self.groups)
        return [True] * size if self.weighed is None else self.weighed.view(size, -1).all(dim=1).tolist()

    def take(self, vlm: VLM, rows: Sequence[int]) -> Part:
        """Returns the groups ``rows`` of the part."""
        size = len(self.batch.completions[0])
        texts = [row * size + g for row in rows for g in range(size)]
        return replace(
            self,
            batch=self.batch.take(vlm, rows),
            groups=tuple(self.groups[row] for row in rows),
            advantages=self.advantages[texts],
            old_logprobs=None if self.old_logprobs is None else self.old_logprobs[texts],
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs[texts],
            completion_mask=None if self.completion_mask is None else self.completion_mask[texts],
            weighed=None if self.weighed is None else self.weighed[texts],
        )

    def without_weight(self) -> Part:
        """Returns the part with no token that counts: the same forward and backward, and no gradient."""
        return replace(
            self,
            advantages=torch.zeros_like(self.advantages),
            completion_mask=torch.zeros_like(self.batch.texts.loss_mask),
        )

    def to(self, device: torch.device | str) -> Part:
        """Returns a copy on ``device``."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            batch=self.batch.to(device),
            advantages=self.advantages.to(device),
            old_logprobs=moved(self.old_logprobs),
            ref_logprobs=moved(self.ref_logprobs),
            completion_mask=moved(self.completion_mask),
            weighed=moved(self.weighed),
        )


def make_parts(
    rolled: Sequence[Rolled], advantages: Tensor, mask_truncated: bool = False, counted: Tensor | None = None
) -> list[Part]:
    """Hands every part its rows of the advantages.

    Args:
        rolled: Completions of B prompts, in some parts.
        advantages: [B, G].
        mask_truncated: Leaves completions that were cut at their maximal length out of the loss.
        counted: [B] bool, prompts that count in the loss; None: all.
    """
    parts, start = [], 0
    everything_counts = counted is None or bool(counted.all())
    for item in rolled:
        rows = advantages[start : start + len(item.groups)].flatten().float().to(item.batch.texts.ids.device)
        mask = whole_completions(item.batch) if mask_truncated else None
        weighed = None
        if counted is not None and not everything_counts:
            own = counted[start : start + len(item.groups)].to(rows.device)
            weighed = own.repeat_interleave(advantages.shape[1])
            mask = (item.batch.texts.loss_mask if mask is None else mask) & weighed[:, None]
        parts.append(Part(item.batch, item.groups, rows, completion_mask=mask, weighed=weighed))
        start += len(item.groups)
    return parts


def whole_completions(batch: CompletionBatch) -> Tensor:
    """Returns the mask [n, L] of the tokens of completions that ended by themselves."""
    ended = [completion.finish_reason == "stop" for group in batch.completions for completion in group]
    mask = batch.texts.loss_mask
    return mask & torch.tensor(ended, device=mask.device).unsqueeze(1)


def count_step(parts: Sequence[Part]) -> StepCounts:
    """Counts what an optimizer step of this rank holds, as float32 scalars; clips without weight are in no count."""
    tokens = torch.stack([part.counted.sum() for part in parts]).sum().float()
    completions = sum(len(p.advantages) if p.weighed is None else int(p.weighed.sum()) for p in parts)
    forwards = sum(p.weighed is None or bool(p.weighed.any()) for p in parts)
    return StepCounts(tokens, tokens.new_tensor(float(completions)), tokens.new_tensor(float(forwards)))


def split_evenly(parts: Sequence[T], n: int) -> Iterator[list[T]]:
    """Splits the parts of a step into at most ``n`` minibatches of about equal size, none of them empty."""
    for i in range(n):
        chunk = list(parts[i * len(parts) // n : (i + 1) * len(parts) // n])
        if chunk:
            yield chunk
