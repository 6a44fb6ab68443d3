"""1 for the right answer."""

from __future__ import annotations

from vidreason.rewards.base import RewardFn, RewardInput
from vidreason.rewards.completion import same_label


class AccuracyReward(RewardFn):
    """1 iff the first ``<answer>`` block is the label, stripped and case-folded; anything unparseable is 0.

    The rest of the completion does not matter: form is :class:`~vidreason.rewards.format.FormatReward`'s concern.
    """

    def __call__(self, item: RewardInput) -> float:
        """Returns 1.0 or 0.0."""
        return float(same_label(item.parsed.answer, item.label))
