"""1 for the right form."""

from __future__ import annotations

from vidreason.rewards.base import RewardFn, RewardInput


class FormatReward(RewardFn):
    """1 iff the whole completion is one think block, then one answer block, free of tags and special tokens.

    That is the default form; where the stage asks for another (``completion``), its blocks in its order. What the
    blocks say does not matter; they may be empty.
    """

    def __call__(self, item: RewardInput) -> float:
        """Returns 1.0 or 0.0."""
        return float(item.parsed.well_formed)
