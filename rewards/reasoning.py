"""Reward for the presence of reasoning."""

from __future__ import annotations

from vidreason.rewards.base import RewardFn, RewardInput


class ReasoningReward(RewardFn):
    """1 if the first ``<think>`` block contains more than white space, else 0."""

    def __call__(self, item: RewardInput) -> float:
        """Returns 1.0 or 0.0."""
        return float(bool(item.parsed.reasoning))
