"""The base class of reward functions, and the combination of several rewards into one score."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vidreason.rewards.completion import ParsedCompletion


@dataclass(frozen=True)
class RewardInput:
    """Everything a reward function may look at."""

    completion: str
    """The text as it was sampled."""
    parsed: ParsedCompletion
    label: str
    """The true label of the clip."""
    label_names: tuple[str, ...]
    """All labels in the order of the task."""
    finish_reason: Literal["stop", "length"] = "stop"
    """``length`` if the completion was truncated at the maximum number of tokens."""
    n_tokens: int | None = None
    """Number of sampled tokens, including the end of the turn; None if only the text is known."""


class RewardFn(ABC):
    """A rule that scores one completion.

    Subclass it, write ``__call__``, and name the class in YAML by its ``class_path``.

    Args:
        weight: Factor of this reward in the total; negative for a penalty.

    Raises:
        ValueError: If the weight is not a finite number.
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
    def __call__(self, item: RewardInput) -> float | None:
        """Returns the unweighted reward of one completion; None or NaN if it does not apply to this completion.

        Such a reward is left out of the total (see ``score_group``) and counted in the logs, never replaced by 0.
        """


@dataclass(frozen=True)
class RewardScore:
    """The score of one completion."""

    total: float
    """Sum of weight x part; NaN if a part is missing that other completions of the prompt have."""
    parts: dict[str, float]
    """Unweighted reward by name; NaN if the reward did not apply."""

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the rewards that did not apply."""
        return tuple(name for name, value in self.parts.items() if math.isnan(value))


def score_completion(rewards: Sequence[RewardFn], item: RewardInput) -> RewardScore:
    """Scores one completion with every reward.

    Args:
        rewards: The reward functions; their names must differ.
        item: The completion and its label.

    Returns:
        The weighted total and the unweighted parts; the total is NaN if a part is.

    Raises:
        ValueError: If there is no reward, two share a name, or one returned an infinite number.
    """
    if not rewards:
        raise ValueError("no reward functions: list at least one under `rewards`")
    parts: dict[str, float] = {}
    for reward in rewards:
        if reward.name in parts:
            raise ValueError(f"two rewards are named {reward.name!r}: remove one or subclass it under another name")
        returned = reward(item)
        value = math.nan if returned is None else float(returned)
        if math.isinf(value):
            raise ValueError(f"{type(reward).__name__} returned {value} for {item.completion[:80]!r}")
        parts[reward.name] = value
    return RewardScore(_total(rewards, parts), parts)


def score_group(rewards: Sequence[RewardFn], items: Sequence[RewardInput]) -> tuple[RewardScore, ...]:
    """Scores the completions of one prompt so that their totals are comparable.

    A reward that is None or NaN for all of them is left out of all totals. One that is None or NaN for some leaves
    those without a total, because they cannot be compared with the others.

    Args:
        rewards: The reward functions; their names must differ.
        items: The completions of one prompt.

    Returns:
        Scores in the order of ``items``; all totals are NaN if no reward applies.
    """
    scores = [score_completion(rewards, item) for item in items]
    applying = [r for r in rewards if not all(math.isnan(score.parts[r.name]) for score in scores)]
    return tuple(RewardScore(_total(applying, score.parts), score.parts) for score in scores)


def _total(rewards: Sequence[RewardFn], parts: Mapping[str, float]) -> float:
    # NaN propagates through the sum, so one missing part makes the total NaN
    return sum(reward.weight * parts[reward.name] for reward in rewards) if rewards else math.nan
