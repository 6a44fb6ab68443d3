"""Reward for reasoning of a suitable length."""

from __future__ import annotations

from vidreason.rewards.base import RewardFn, RewardInput


class LengthReward(RewardFn):
    """1 if ``min_words`` <= words of the reasoning <= ``max_words``, else 0; also 0 without a think block.

    Args:
        min_words: Fewest words; words are separated by white space.
        max_words: Most words.
        weight: Factor of this reward in the total.

    Raises:
        ValueError: If a bound is negative, or ``min_words`` exceeds ``max_words``.
    """

    def __init__(self, min_words: int, max_words: int, weight: float = 1.0) -> None:
        super().__init__(weight)
        if not 0 <= min_words <= max_words:
            raise ValueError(f"LengthReward needs 0 <= min_words <= max_words, got {min_words} and {max_words}")
        self.min_words = min_words
        self.max_words = max_words

    def __call__(self, item: RewardInput) -> float:
        """Returns 1.0 or 0.0."""
        if item.parsed.reasoning is None:
            return 0.0
        return float(self.min_words <= len(item.parsed.reasoning.split()) <= self.max_words)
