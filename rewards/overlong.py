"""Less for a completion that comes close to its maximal length."""

from __future__ import annotations

from vidreason.rewards.base import RewardFn, RewardInput


class OverlongReward(RewardFn):
    """0 up to ``max_tokens - buffer`` tokens, then falling evenly to -1 at ``max_tokens`` (DAPO, arXiv 2503.14476).

    The paper's soft length penalty, equation 13: it is added to the other rewards, so leave the weight positive.

    Args:
        max_tokens: Length at which the penalty is full, as a rule ``train_sampling.max_new_tokens``.
        buffer: Tokens over which the penalty grows.
        weight: Factor of this reward in the total.

    Raises:
        ValueError: Not 0 < buffer <= max_tokens.
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
            ValueError: The number of tokens is not known.
        """
        if item.n_tokens is None:
            raise ValueError("OverlongReward counts tokens, but only the text is known: give RewardInput.n_tokens")
        beyond = item.n_tokens - (self.max_tokens - self.buffer)
        return -min(max(beyond, 0), self.buffer) / self.buffer
