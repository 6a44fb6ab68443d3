"""More for a stated confidence that fits."""

from __future__ import annotations

from vidreason.rewards.base import RewardFn, RewardInput
from vidreason.rewards.completion import same_label


class BrierReward(RewardFn):
    """Minus the squared distance between the stated confidence and whether the answer is right (0 or 1).

    With :class:`~vidreason.rewards.accuracy.AccuracyReward` beside it, the total is that of RLCR (arXiv 2507.16806).
    The completion has to state its confidence (``completion: {confidence: true}``); one that states none gets -1, as
    the boldest error does.
    """

    def __call__(self, item: RewardInput) -> float:
        """Returns a number from -1 to 0."""
        if item.parsed.confidence is None:
            return -1.0
        return -((item.parsed.confidence - float(same_label(item.parsed.answer, item.label))) ** 2)
