"""What a reward function is, and how several make one score."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vidreason.rewards.completion import ParsedCompletion, parse_completion


@dataclass(frozen=True)
class RewardInput:
    """Everything a reward function may look at."""

    completion: str
    """The text as it was sampled."""
    parsed: ParsedCompletion
    label: str
    """The clip's true label."""
    label_names: tuple[str, ...]
    """All labels in the order of the task."""
    finish_reason: Literal["stop", "length"] = "stop"
    """``length``: the completion was cut at its maximal length."""

    @classmethod
    def from_text(
        cls, completion: str, label: str, label_names: Sequence[str], finish_reason: Literal["stop", "length"] = "stop"
    ) -> RewardInput:
        """Parses a completion and puts it beside its label."""
        return cls(completion, parse_completion(completion), label, tuple(label_names), finish_reason)


class RewardFn(ABC):
    """A rule that scores one completion.

    Subclass it, write ``__call__``, and name the class in YAML by its ``class_path``.

    Args:
        weight: Factor of this reward in the total; may be negative, for a penalty.

    Raises:
        ValueError: The weight is not a finite number.
    """

    def __init__(self, weight: float = 1.0) -> None:
        if not math.isfinite(weight):
            raise ValueError(f"{type(self).__name__}: weight must be a finite number, got {weight}")
        self.weight = weight

    @property
    def name(self) -> str:
        """Name in logs, from the class: ``AccuracyReward`` is ``accuracy``, ``EvidenceOrder`` is ``evidence_order``."""
        stem = type(self).__name__.removesuffix("Reward") or type(self).__name__
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", stem).lower()

    @abstractmethod
    def __call__(self, item: RewardInput) -> float:
        """Returns the reward of one completion, before its weight."""


@dataclass(frozen=True)
class RewardScore:
    """The score of one completion."""

    total: float
    """Sum of weight x part."""
    parts: dict[str, float]
    """Reward by name, before its weight."""


def score_completion(rewards: Sequence[RewardFn], item: RewardInput) -> RewardScore:
    """Scores one completion with every reward.

    Args:
        rewards: The reward functions; their names must differ.
        item: The completion and its label.

    Returns:
        The weighted total and the unweighted parts.

    Raises:
        ValueError: There is no reward, two share a name, or one returned something that is not a finite number.
    """
    if not rewards:
        raise ValueError("no reward functions: list at least one under `rewards`")
    parts: dict[str, float] = {}
    for reward in rewards:
        if reward.name in parts:
            raise ValueError(f"two rewards are named {reward.name!r}: remove one or subclass it under another name")
        value = float(reward(item))
        if not math.isfinite(value):
            raise ValueError(f"{type(reward).__name__} returned {value} for {item.completion[:80]!r}")
        parts[reward.name] = value
    return RewardScore(sum(reward.weight * parts[reward.name] for reward in rewards), parts)
