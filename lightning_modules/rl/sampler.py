"""Samples the completions of a GRPO step and scores them.

Shape letters: B prompts of a step, G completions per prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from vidreason.datamodules.types import Clip, EncodedPrompts, VideoBatch
from vidreason.lightning_modules.functional.advantages import dead_groups
from vidreason.lightning_modules.rl.metrics import Stopwatch
from vidreason.lightning_modules.rl.microbatch import ScoredRollouts
from vidreason.lightning_modules.rl.rollouts import reward_tensor, score_completions, warn_failed_rewards
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.completions import CompletionBatch, generate_completions, take_prompts
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.rewards.base import RewardFn
from vidreason.rewards.completion import CompletionForm

_RESAMPLING_SEED = 1_000_003
"""Step between the seeds of resampling attempts; large, so that these are not seeds of other runs of the user."""


@dataclass(frozen=True)
class RolloutOptions:
    """Options of the rollouts.

    Args:
        group_size: Completions per prompt (G).
        sampling: Sampling options of the completions.
        resample: Number of times that groups with equal rewards, which have no learning signal, are sampled again.
        balance_classes: Draw the prompts so that all classes are equally frequent.
        max_unparsed_steps: Stop if no completion has parsed in this many first steps; 0 never stops.
    """

    group_size: int = 8
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=2048))
    resample: int = 0
    balance_classes: bool = False
    max_unparsed_steps: int = 5

    def __post_init__(self) -> None:
        if self.sampling.temperature <= 0:
            raise ValueError(
                "rollouts.sampling.temperature must be positive: greedy completions of a prompt are all equal"
            )
        if self.group_size < 2:
            raise ValueError(
                f"rollouts.group_size must be at least 2, got {self.group_size}: the advantage of a completion is its "
                "reward compared with those of the others"
            )
        if self.max_unparsed_steps < 0:
            raise ValueError(f"rollouts.max_unparsed_steps must be 0 (no check) or more, got {self.max_unparsed_steps}")
        if self.resample < 0:
            raise ValueError(f"rollouts.resample must not be negative, got {self.resample}")


@dataclass
class RolloutSampler:
    """Samples G completions per prompt from a policy and scores them.

    Args:
        vlm: The model family.
        options: Options of the rollouts.
        rewards: The reward functions.
        seed: The run's seed.
        form: Blocks that a completion consists of.
        label_names: The class names.
    """

    vlm: VLM
    options: RolloutOptions
    rewards: Sequence[RewardFn]
    seed: int
    form: CompletionForm
    label_names: Sequence[str]
    _warned: frozenset[str] = frozenset()

    def sample(
        self, model: nn.Module, batch: VideoBatch, clips_per_forward: int, step: int, clock: Stopwatch
    ) -> list[ScoredRollouts]:
        """Samples and scores the completions of a batch of B prompts.

        Args:
            model: The policy, unsharded, since ranks may sample different numbers of tokens and groups.
            batch: The prompts.
            clips_per_forward: Prompts per forward pass.
            step: Optimizer step; the noise depends on it, the seed, the clip and the index of the completion.
            clock: Stopwatch for ``gen`` and ``reward``.
        """
        parts = []
        for start in range(0, len(batch), clips_per_forward):
            index = torch.arange(start, min(start + clips_per_forward, len(batch)), device=batch.labels.device)
            prompts = batch.prompts if len(index) == len(batch) else take_prompts(self.vlm, batch.prompts, index)
            with clock("gen"):
                sampled = self._generate(model, prompts, batch.clips[start : start + len(index)], self.seed, step)
            with clock("reward"):
                parts.append(self._score(sampled))
        for attempt in range(1, self.options.resample + 1):
            with clock("gen"):
                parts = self._resample_dead_groups(model, parts, batch.sample_mask.tolist(), attempt, step)
        return parts

    def _generate(
        self, model: nn.Module, prompts: EncodedPrompts, clips: Sequence[Clip], seed: int, step: int
    ) -> CompletionBatch:
        options = self.options
        return generate_completions(
            self.vlm, model, prompts, clips, options.group_size, options.sampling, seed, step, self.form
        )

    def _score(self, batch: CompletionBatch) -> ScoredRollouts:
        groups = score_completions(batch, self.rewards, self.label_names)
        self._warned |= warn_failed_rewards(groups, self._warned)
        return ScoredRollouts(batch, groups)

    def _resample_dead_groups(
        self, model: nn.Module, parts: Sequence[ScoredRollouts], counts: Sequence[bool], attempt: int, step: int
    ) -> list[ScoredRollouts]:
        """Samples the groups with equal rewards again with other noise, if their clip ``counts`` [B]."""
        fresh: list[ScoredRollouts] = []
        start = 0
        for part in parts:
            dead = dead_groups(reward_tensor(part.groups)).tolist()
            rows = [row for row, is_dead in enumerate(dead) if is_dead and counts[start + row]]
            start += len(part.groups)
            if not rows:
                fresh.append(part)
                continue
            # The noise depends on seed, step and clip, so that only another seed gives other completions.
            old, seed = part.batch.take(self.vlm, rows), self.seed + _RESAMPLING_SEED * attempt
            again = self._score(self._generate(model, old.prompts, old.clips, seed, step))
            groups = list(part.groups)
            for row, group in zip(rows, again.groups, strict=True):
                groups[row] = group
            fresh.append(replace(part, batch=part.batch.with_groups(rows, again.batch), groups=tuple(groups)))
        return fresh
