"""Reward for labels that have an order: a near miss earns a part."""

from __future__ import annotations

from vidreason.rewards.base import RewardFn, RewardInput
from vidreason.rewards.completion import match_label

_LARGEST_GAP = 2  # places; labels further away earn nothing


class OrdinalReward(RewardFn):
    """1 for the label, 1/2 and 1/3 for labels one and two places away, 0 for any other answer.

    The order is that of the task's classes, so the task should say ``ordinal: true``.
    """

    def __call__(self, item: RewardInput) -> float:
        """Returns 1.0, 0.5, 1/3 or 0.0.

        Raises:
            ValueError: If the label of the clip is not one of the labels of the task.
        """
        truth = match_label(item.label, item.label_names)
        if truth is None:
            raise ValueError(f"label {item.label!r} is none of {', '.join(item.label_names)}: check the task's classes")
        guess = match_label(item.parsed.answer, item.label_names)
        if guess is None:
            return 0.0
        gap = abs(item.label_names.index(guess) - item.label_names.index(truth))
        return 1.0 / (gap + 1) if gap <= _LARGEST_GAP else 0.0
