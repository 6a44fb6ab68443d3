"""Defines the records that a model returns: scores of given texts, and sampled texts.

Letters: B prompts, G completions of each, N texts, L tokens of the longest text.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """Scores of the tokens of N texts."""

    logprobs: Tensor
    """[N, L] fp32 log-probabilities, 0 outside ``texts.loss_mask``."""
    greedy: Tensor
    """[N, L] fp32, 1 where the token is the likeliest, else 0; no gradient."""
    entropy: Tensor | None
    """[N, L] fp32, in nats, 0 outside ``texts.loss_mask``; None if it was not requested."""


class Generated(NamedTuple):
    """N = B·G completions in the order b0g0, b0g1, …, b1g0, …."""

    ids: Tensor
    """[N, L] int64, right-padded, including the end of turn."""
    mask: Tensor
    """[N, L] bool, True on sampled tokens."""
    logprobs: Tensor
    """[N, L] fp32 log-probs at the sampling temperature (greedy: at 1), before top-p and top-k."""
    finish_reason: tuple[Literal["stop", "length"], ...]
    """[N] ``length``: truncated at max_new_tokens."""
    owner: Tensor
    """[N] int64, index of the prompt."""
    texts: tuple[str, ...]
    """[N] decoded without the end-of-turn token; other special tokens stay visible. If the prompt ends with the opening
    tag of the reasoning, the text begins with it."""
