"""Completions with their rewards.

Shape letters: B prompts, G completions per prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vidreason.datamodules.types import Clip
from vidreason.lightning_modules.vlms.completions import Completion, CompletionBatch
from vidreason.rewards.base import RewardFn, RewardInput, RewardScore, score_group

logger = logging.getLogger(__name__)


class NoParsedCompletionsError(ValueError):
    """The policy never writes a completion that parses, so no reward can teach it anything."""


@dataclass(frozen=True)
class Rollout:
    """A completion and its reward."""

    completion: Completion
    score: RewardScore


@dataclass(frozen=True)
class RolloutGroup:
    """The G rollouts of one clip."""

    clip: Clip
    rollouts: tuple[Rollout, ...]


class RolloutOutput(NamedTuple):
    """What a training step shows callbacks."""

    groups: tuple[RolloutGroup, ...]
    """[B]"""
    advantages: Tensor
    """[B, G]"""
    sample_mask: Tensor
    """[B] bool, groups whose clip counts."""


def score_completions(
    batch: CompletionBatch, rewards: Sequence[RewardFn], label_names: Sequence[str]
) -> tuple[RolloutGroup, ...]:
    """Rewards every completion.

    Args:
        batch: G completions for each of B labelled clips.
        rewards: The reward functions, weighted by themselves.
        label_names: Names of all classes.

    Returns:
        [B] groups.

    Raises:
        ValueError: A clip has no label.
    """
    names = tuple(label_names)
    groups = []
    for clip, completions in zip(batch.clips, batch.completions, strict=True):
        scores = score_group(rewards, [_reward_input(clip, completion, names) for completion in completions])
        groups.append(RolloutGroup(clip, tuple(map(Rollout, completions, scores))))
    return tuple(groups)


def _reward_input(clip: Clip, completion: Completion, label_names: tuple[str, ...]) -> RewardInput:
    if clip.label is None:
        raise ValueError(f"{clip.where or clip.path}: rewards need a label, but this clip has none")
    return RewardInput(
        completion.text, completion.parsed, clip.label, label_names, completion.finish_reason, completion.n_tokens
    )


def reward_tensor(groups: Sequence[RolloutGroup]) -> Tensor:
    """Returns the total rewards [B, G] of B groups in float64; NaN where a completion could not be scored."""
    return torch.tensor([[r.score.total for r in group.rollouts] for group in groups], dtype=torch.float64)


def warn_failed_rewards(groups: Sequence[RolloutGroup], named: Collection[str] = ()) -> frozenset[str]:
    """Warns once about every reward that returned None or NaN, naming the first clip.

    Args:
        groups: Scored groups.
        named: Rewards that were warned about before.

    Returns:
        The rewards that were warned about now.
    """
    fresh: set[str] = set()
    for group in groups:
        for rollout in group.rollouts:
            for name in set(rollout.score.failed).difference(named, fresh):
                fresh.add(name)
                logger.warning(
                    "reward %r returned None or NaN, first about clip %s (%r): such completions are left out and "
                    "counted in train/rewards/%s/failures",
                    name,
                    group.clip.video_id,
                    rollout.completion.text[:60],
                    name,
                )
    return frozenset(fresh)
