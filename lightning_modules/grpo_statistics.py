"""What a GRPO step logs, under the names that TRL's users know.

Shape letters: B prompts of a step, G completions per prompt, P rewards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidreason.lightning_modules.functional.advantages import dead_groups
from vidreason.lightning_modules.functional.losses import GRPOLoss
from vidreason.lightning_modules.rollout import RolloutGroup
from vidreason.rewards.completion import match_label

_FACTS = ("reward", "length", "truncated", "parsed", "logprob_sum", "counted")


@dataclass(frozen=True)
class RolloutTable:
    """A row of numbers about every completion of a step, so that one gather brings together what all ranks sampled."""

    values: Tensor
    """[B, G, 6 + P] float64: total reward, tokens, whether it was cut, whether its answer names a class, sum of the
    sampler's log-probs, whether its clip counts, then the rewards before their weights; NaN where one could not be
    told"""
    reward_names: tuple[str, ...]
    """[P]"""

    @classmethod
    def of(
        cls, groups: Sequence[RolloutGroup], label_names: Sequence[str], fillers: Collection[int] = ()
    ) -> RolloutTable:
        """Reads the groups [B] of one rank, of which ``fillers`` do not count; answers are matched to the C classes."""
        names = tuple(groups[0].rollouts[0].score.parts)
        rows = [
            [
                [
                    r.score.total,
                    float(r.completion.n_tokens),
                    float(r.completion.finish_reason == "length"),
                    float(match_label(r.completion.parsed.answer, label_names) is not None),
                    float(r.completion.logprobs.sum()),
                    float(row not in fillers),
                    *(r.score.parts[name] for name in names),
                ]
                for r in group.rollouts
            ]
            for row, group in enumerate(groups)
        ]
        return cls(torch.tensor(rows, dtype=torch.float64), names)

    def over_ranks(self, gather: Callable[[Tensor], Tensor]) -> RolloutTable:
        """Returns the table of all ranks, rank after rank."""
        return replace(self, values=gather(self.values))

    def counted(self) -> RolloutTable:
        """Returns the groups of clips that count."""
        return replace(self, values=self.values[self.fact("counted").bool().all(dim=1)])

    def fact(self, name: str) -> Tensor:
        """Returns the column [B, G] of that name: reward, length, truncated, parsed, logprob_sum or counted."""
        return self.values[..., _FACTS.index(name)]

    def parts(self, name: str) -> Tensor:
        """Returns the column [B, G] of a reward before its weight."""
        return self.values[..., len(_FACTS) + self.reward_names.index(name)]


def rollout_statistics(table: RolloutTable) -> dict[str, Tensor]:
    """Describes what was sampled and how it was rewarded; rewards that could not be told are in no mean.

    Args:
        table: Of all ranks, groups that count.

    Returns:
        Scalars by log name. ``train/entropy`` is the mean of -log p over the sampled tokens, which estimates the
        entropy without a second pass over the vocabulary.
    """
    rewards, lengths = table.fact("reward"), table.fact("length")
    values = {
        "train/reward": rewards.nanmean(),
        "train/reward_std": nan_std(rewards, dim=1).nanmean(),
        "train/frac_reward_zero_std": dead_groups(rewards).float().mean(),
        "train/unscored": rewards.isnan().float().sum(),
        "train/completions/mean_length": lengths.mean(),
        "train/completions/min_length": lengths.min(),
        "train/completions/max_length": lengths.max(),
        "train/completions/clipped_ratio": table.fact("truncated").mean(),
        "train/parse_rate": table.fact("parsed").mean(),
        "train/entropy": -table.fact("logprob_sum").sum() / lengths.sum(),
    }
    for name in table.reward_names:
        part = table.parts(name).flatten()
        values[f"train/rewards/{name}/mean"] = part.nanmean()
        values[f"train/rewards/{name}/std"] = nan_std(part, dim=0)
        values[f"train/rewards/{name}/failures"] = part.isnan().float().sum()
    return {name: value.float() for name, value in values.items()}


def update_statistics(losses: Sequence[GRPOLoss]) -> dict[str, Tensor]:
    """Describes one optimizer step; every field is already divided by the step's counts, so parts add up.

    Args:
        losses: Of the parts of the step.

    Returns:
        Scalars by log name.
    """
    total = GRPOLoss(*(torch.stack(values).sum().detach() for values in zip(*losses, strict=True)))
    return {
        "train/loss": total.loss,
        "train/policy_loss": total.policy,
        "train/kl": total.kl,
        "train/clip_ratio/low_mean": total.clip_low,
        "train/clip_ratio/high_mean": total.clip_high,
        "train/clip_ratio/region_mean": total.clip_region,
        "train/clip_ratio/dual_mean": total.dual_clip,
        "train/importance": total.importance,
        "rollout_mismatch/mean": total.rollout_gap,
    }


def prefix_statistics(prompt_tokens: Tensor, completion_tokens: int, group_size: int, shared: bool) -> dict[str, float]:
    """Says what encoding each prompt once saves in a forward over all rollouts.

    Args:
        prompt_tokens: [B] tokens of each prompt, the video's included.
        completion_tokens: Of all completions.
        group_size: G.
        shared: Whether the prompts' encodings are shared.

    Returns:
        ``prefix/dedup_ratio``, tokens of the route that repeats the prompts over tokens that are run, and
        ``prefix/saved_tokens``, their difference.
    """
    once = int(prompt_tokens.sum())
    repeated = once * group_size + completion_tokens
    run = once + completion_tokens if shared else repeated
    return {"prefix/dedup_ratio": repeated / max(run, 1), "prefix/saved_tokens": float(repeated - run)}


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
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what was started here is not finished elsewhere
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def logged(self) -> dict[str, float]:
        """Returns all times so far by log name."""
        seconds = {**self._seconds, "step": time.perf_counter() - self._start}
        return {f"timing_s/{name}": value for name, value in seconds.items()}


def nan_std(values: Tensor, dim: int) -> Tensor:
    """Returns the ddof-1 standard deviation of the values that are not NaN; 0 for one value, NaN for none."""
    known = ~values.isnan()
    count = known.sum(dim, keepdim=True)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    variance = squares / (count - 1).clamp(min=1)
    return torch.where(count > 0, variance.sqrt(), torch.nan).squeeze(dim)
