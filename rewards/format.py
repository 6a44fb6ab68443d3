"""Reward for the right form."""

from __future__ import annotations

from vidreason.rewards.base import RewardFn, RewardInput


class FormatReward(RewardFn):
    """1 if the whole completion follows the grammar, else 0.

    By default the grammar is one think block, then one answer block, without tags or special tokens inside; the
    option ``completion`` of the stage selects another form. The content of the blocks does not count; it may be empty.
    """

    def __call__(self, item: RewardInput) -> float:
        """Returns 1.0 or 0.0."""
        return float(item.parsed.well_formed)
