"""Metrics of a GRPO step, named as in TRL.

Shape letters: B prompts of a step, G completions per prompt, P rewards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vidreason.lightning_modules.functional.advantages import dead_groups
from vidreason.lightning_modules.functional.losses import PolicyLossOutput
from vidreason.lightning_modules.rl.rollouts import NoParsedCompletionsError, RolloutGroup
from vidreason.rewards.completion import match_label

_COLUMNS = ("reward", "length", "truncated", "parsed", "logprob_sum", "valid")


@dataclass(frozen=True)
class RolloutTable:
    """The numbers of all completions of a step in one tensor, so that one gather collects those of all ranks."""

    values: Tensor
    """[B, G, 6 + P] float64: total reward, number of tokens, whether the completion was truncated, whether its answer
    names a class, sum of the sampler's log-probs, whether its clip counts, and the P unweighted rewards; NaN for a
    reward that returned None."""
    reward_names: tuple[str, ...]
    """[P]"""

    @classmethod
    def of(
        cls, groups: Sequence[RolloutGroup], label_names: Sequence[str], sample_mask: Sequence[bool]
    ) -> RolloutTable:
        """Builds the table of the groups of one rank.

        Args:
            groups: [B] groups of G.
            label_names: Class names that answers are matched to.
            sample_mask: [B] whether the clip of a group counts.
        """
        # Every completion has the same rewards in the same order.
        names = tuple(groups[0].rollouts[0].score.parts)
        rows = [
            [
                [
                    r.score.total,
                    float(r.completion.n_tokens),
                    float(r.completion.finish_reason == "length"),
                    float(match_label(r.completion.parsed.answer, label_names) is not None),
                    float(r.completion.logprobs.sum()),
                    float(valid),
                    *(r.score.parts[name] for name in names),
                ]
                for r in group.rollouts
            ]
            for group, valid in zip(groups, sample_mask, strict=True)
        ]
        return cls(torch.tensor(rows, dtype=torch.float64), names)

    def gathered(self, gather: Callable[[Tensor], Tensor]) -> RolloutTable:
        """Returns the table of all ranks, in rank order."""
        return replace(self, values=gather(self.values))

    def valid(self) -> RolloutTable:
        """Returns the table of the groups whose clips count."""
        return replace(self, values=self.values[self.column("valid").bool().all(dim=1)])

    def column(self, name: str) -> Tensor:
        """Returns a column [B, G]: reward, length, truncated, parsed, logprob_sum or valid."""
        return self.values[..., _COLUMNS.index(name)]

    def reward(self, name: str) -> Tensor:
        """Returns the column [B, G] of one unweighted reward."""
        return self.values[..., len(_COLUMNS) + self.reward_names.index(name)]

    def total_rewards(self) -> Tensor:
        """Returns the total rewards [B, G]; NaN if the completion was not scored or its clip does not count."""
        # NaN is ignored in means and deviations, so that such a clip does not change the advantages of others.
        return self.column("reward").masked_fill(self.column("valid") == 0, torch.nan)


@dataclass
class RolloutCounters:
    """Counts over a whole fit; they are equal on all ranks and stored in checkpoints."""

    steps: int = 0
    """Rollout steps with at least one clip that counts."""
    parsed: int = 0
    """Number of completions whose answer names a class."""
    tokens: int = 0
    """Number of sampled tokens."""

    def add(self, table: RolloutTable) -> None:
        """Adds the completions of a step.

        Args:
            table: Groups of all ranks that count.
        """
        self.steps += bool(len(table.values))
        self.parsed += int(table.column("parsed").sum())
        self.tokens += int(table.column("length").sum())

    def check_parsed(self, max_steps: int, example: str) -> None:
        """Checks that at least one completion has parsed, since otherwise the rewards give no signal.

        Args:
            max_steps: Steps without a parsed completion after which the stage stops; 0 never stops it.
            example: A completion for the message.

        Raises:
            NoParsedCompletionsError: If no completion of the first ``max_steps`` steps has parsed.
        """
        if max_steps and self.parsed == 0 and self.steps >= max_steps:
            raise NoParsedCompletionsError(
                f"none of the completions of the first {self.steps} steps names a class in an <answer> block (the last "
                f"one begins {example[:60]!r}), so no reward can teach this policy. Run the cold start first:\n"
                "  vidreason fit --config configs/sft_cold_start.yaml --run_dir runs/cold_start\n"
                "and hand its weights over:\n"
                "  vidreason fit --config configs/grpo.yaml --model.init_args.adapter_path runs/cold_start/adapter"
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts."""
        return asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the counts of an interrupted fit."""
        self.steps, self.parsed, self.tokens = state_dict["steps"], state_dict["parsed"], state_dict["tokens"]


def rollout_statistics(table: RolloutTable) -> dict[str, Tensor]:
    """Returns the statistics of sampled completions and rewards; missing rewards (NaN) are not averaged.

    Args:
        table: Groups of all ranks that count; at least one.

    Returns:
        Scalars by log name. ``train/entropy`` is the mean of -log p over the sampled tokens in nats, an estimate of the
        entropy that needs no second pass over the vocabulary.
    """
    rewards, lengths = table.column("reward"), table.column("length")
    values = {
        "train/reward": rewards.nanmean(),
        "train/reward_std": nan_std(rewards, dim=1).nanmean(),
        "train/frac_reward_zero_std": dead_groups(rewards).float().mean(),
        "train/unscored": rewards.isnan().float().sum(),
        "train/completions/mean_length": lengths.mean(),
        "train/completions/min_length": lengths.min(),
        "train/completions/max_length": lengths.max(),
        "train/completions/clipped_ratio": table.column("truncated").mean(),
        "train/parse_rate": table.column("parsed").mean(),
        "train/entropy": -table.column("logprob_sum").sum() / lengths.sum(),
    }
    for name in table.reward_names:
        part = table.reward(name).flatten()
        values[f"train/rewards/{name}/mean"] = part.nanmean()
        values[f"train/rewards/{name}/std"] = nan_std(part, dim=0)
        values[f"train/rewards/{name}/failures"] = part.isnan().float().sum()
    return {name: value.float() for name, value in values.items()}


def update_statistics(losses: Sequence[PolicyLossOutput]) -> dict[str, Tensor]:
    """Returns the statistics of one optimizer step, the sums over its micro-batches.

    Args:
        losses: Outputs of the micro-batches; every field is already divided by the counts of the whole step.

    Returns:
        Scalars by log name.
    """
    total = PolicyLossOutput(*(torch.stack(values).sum().detach() for values in zip(*losses, strict=True)))
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
    """Returns how many tokens a forward pass over all rollouts saves by encoding each prompt once.

    Args:
        prompt_tokens: [B] tokens of each prompt, including those of the video.
        completion_tokens: Tokens of all completions.
        group_size: G.
        shared: Whether completions share the encoding of their prompt.

    Returns:
        ``prefix/dedup_ratio``, the tokens with repeated prompts divided by the tokens that are run, and
        ``prefix/saved_tokens``, their difference.
    """
    once = int(prompt_tokens.sum())
    repeated = once * group_size + completion_tokens
    run = once + completion_tokens if shared else repeated
    return {"prefix/dedup_ratio": repeated / max(run, 1), "prefix/saved_tokens": float(repeated - run)}


class Stopwatch:
    """Measures times in seconds by name; ``step`` is the time since the stopwatch was created."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the duration of a block to ``name``."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # Otherwise the time of running kernels would count for the next block.
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def logged(self) -> dict[str, float]:
        """Returns all times so far by log name."""
        seconds = {**self._seconds, "step": time.perf_counter() - self._start}
        return {f"timing_s/{name}": value for name, value in seconds.items()}


def nan_std(values: Tensor, dim: int) -> Tensor:
    """Returns the standard deviation (ddof 1) of the values that are not NaN; 0 for one value, NaN for none."""
    known = ~values.isnan()
    count = known.sum(dim, keepdim=True)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    variance = squares / (count - 1).clamp(min=1)  # 0 / 1 for one value
    return torch.where(count > 0, variance.sqrt(), torch.nan).squeeze(dim)
