"""Reward for the right answer."""

from __future__ import annotations

from vidreason.rewards.base import RewardFn, RewardInput
from vidreason.rewards.completion import same_label


class AccuracyReward(RewardFn):
    """1 if the first ``<answer>`` block is the label (both stripped and case-folded), else 0.

    The rest of the completion does not count; :class:`~vidreason.rewards.format.FormatReward` judges its form.
    """

    def __call__(self, item: RewardInput) -> float:
        """Returns 1.0 or 0.0."""
        return float(same_label(item.parsed.answer, item.label))
