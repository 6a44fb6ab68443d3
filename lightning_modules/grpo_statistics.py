"""What a GRPO step logs, under the names that TRL's users know.

Shape letters: B prompts of a step, G completions per prompt.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from vidreason.lightning_modules.functional.advantages import dead_groups
from vidreason.lightning_modules.functional.losses import GRPOLoss
from vidreason.lightning_modules.rollout import RolloutGroup


def rollout_statistics(groups: Sequence[RolloutGroup], rewards: Tensor) -> dict[str, Tensor]:
    """Describes what was sampled and how it was rewarded.

    Args:
        groups: [B] of G rollouts each.
        rewards: [B, G] totals.

    Returns:
        Scalars by log name. ``train/entropy`` is the mean of -log p over the sampled tokens, which estimates the
        entropy without a second pass over the vocabulary.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    completions = [rollout.completion for rollout in rollouts]
    lengths = torch.tensor([c.n_tokens for c in completions], dtype=torch.float32)
    logprob_sums = torch.stack([c.logprobs.sum() for c in completions])
    values = {
        "train/reward": rewards.mean(),
        "train/reward_std": _std(rewards, dim=1).mean(),
        "train/frac_reward_zero_std": dead_groups(rewards).float().mean(),
        "train/completions/mean_length": lengths.mean(),
        "train/completions/clipped_ratio": _share([c.finish_reason == "length" for c in completions]),
        "train/parse_rate": _share([c.parsed.answer is not None for c in completions]),
        "train/entropy": -logprob_sums.sum() / lengths.sum(),
    }
    for name in rollouts[0].score.parts:
        part = torch.tensor([rollout.score.parts[name] for rollout in rollouts], dtype=torch.float64)
        values[f"train/rewards/{name}/mean"] = part.mean()
        values[f"train/rewards/{name}/std"] = _std(part, dim=0)
    return {name: value.float() for name, value in values.items()}


def update_statistics(losses: Sequence[GRPOLoss]) -> dict[str, Tensor]:
    """Describes one optimizer step; every field is already divided by the step's tokens, so parts add up.

    Args:
        losses: Of the parts of the step.

    Returns:
        Scalars by log name.
    """
    total = GRPOLoss(*(torch.stack(values).sum().detach() for values in zip(*losses, strict=True)))
    return {
        "train/loss": total.loss,
        "train/kl": total.kl,
        "train/clip_ratio/low_mean": total.clip_low,
        "train/clip_ratio/high_mean": total.clip_high,
        "train/clip_ratio/region_mean": total.clip_region,
        "train/clip_ratio/dual_mean": total.dual_clip,
        "train/importance": total.importance,
        "train/rollout_gap": total.rollout_gap,
    }


class Stopwatch:
    """Seconds by name; ``step`` is everything since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time of a block to ``name``."""
        start = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def logged(self) -> dict[str, float]:
        """Returns all times so far by log name."""
        seconds = {**self._seconds, "step": time.perf_counter() - self._start}
        return {f"timing_s/{name}": value for name, value in seconds.items()}


def _std(values: Tensor, dim: int) -> Tensor:
    return values.std(dim=dim, correction=min(1, values.shape[dim] - 1))


def _share(flags: Sequence[bool]) -> Tensor:
    return torch.tensor(flags, dtype=torch.float32).mean()
