"""1 for any reasoning at all."""

from __future__ import annotations

from vidreason.rewards.base import RewardFn, RewardInput


class ReasoningReward(RewardFn):
    """1 iff the first ``<think>`` block holds more than white space."""

    def __call__(self, item: RewardInput) -> float:
        """Returns 1.0 or 0.0."""
        return float(bool(item.parsed.reasoning))
