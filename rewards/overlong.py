"""Penalty for completions close to the maximum length (DAPO, arXiv 2503.14476)."""

from __future__ import annotations

from vidreason.rewards.base import RewardFn, RewardInput


class OverlongReward(RewardFn):
    """0 up to ``max_tokens - buffer`` tokens, then falling linearly to -1 at ``max_tokens`` (DAPO, equation 13).

    The penalty is negative and is added to the other rewards, so leave the weight positive.

    Args:
        max_tokens: Length of the full penalty, usually ``rollouts.sampling.max_new_tokens``.
        buffer: Number of tokens over which the penalty grows from 0 to -1.
        weight: Factor of this reward in the total.

    Raises:
        ValueError: Unless 0 < buffer <= max_tokens.
    """

    def __init__(self, max_tokens: int, buffer: int, weight: float = 1.0) -> None:
        super().__init__(weight)
        if not 0 < buffer <= max_tokens:
            raise ValueError(f"OverlongReward needs 0 < buffer <= max_tokens, got {buffer} and {max_tokens}")
        self.max_tokens = max_tokens
        self.buffer = buffer

    def __call__(self, item: RewardInput) -> float:
        """Returns a number from -1 to 0.

        Raises:
            ValueError: If the number of tokens is not known.
        """
        if item.n_tokens is None:
            raise ValueError("OverlongReward counts tokens, but only the text is known: give RewardInput.n_tokens")
        beyond = item.n_tokens - (self.max_tokens - self.buffer)
        return -min(max(beyond, 0), self.buffer) / self.buffer
