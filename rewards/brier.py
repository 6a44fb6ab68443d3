"""Reward for calibrated confidence: the negative Brier score of RLCR (arXiv 2507.16806)."""

from __future__ import annotations

from vidreason.rewards.base import RewardFn, RewardInput
from vidreason.rewards.completion import same_label


class BrierReward(RewardFn):
    """Minus the squared difference between the stated confidence and the correctness of the answer (0 or 1).

    Together with :class:`~vidreason.rewards.accuracy.AccuracyReward` the total is the reward of RLCR. The prompt asks
    for a confidence if ``completion: {confidence: true}`` is set; a completion without one gets the minimum, -1.
    """

    def __call__(self, item: RewardInput) -> float:
        """Returns a number from -1 to 0."""
        if item.parsed.confidence is None:
            return -1.0
        return -((item.parsed.confidence - float(same_label(item.parsed.answer, item.label))) ** 2)
