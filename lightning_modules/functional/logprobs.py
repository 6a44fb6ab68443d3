"""Log-probabilities and entropies of tokens, with and without the full logits in memory.

Shape letters: V vocabulary, H hidden size; leading dimensions are free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class TokenScores(NamedTuple):
    """What the model thought of each given token."""

    logprobs: Tensor
    """[...] at least float32"""
    entropy: Tensor | None
    """[...] entropy of the distribution the token was drawn from, None where it was not asked for"""


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0, suppressed: Tensor | None = None) -> Tensor:
    """Log-probability of each given token.

    Args:
        logits: [..., V]; any float type.
        ids: [...] int64, the tokens.
        temperature: Logits are divided by it, as in sampling.
        suppressed: [S] int64, tokens that cannot be sampled: they get probability 0, the others share the rest. A
            given token that is suppressed has log-probability -inf.

    Returns:
        [...] float32 (float64 for float64 logits).

    Raises:
        ValueError: The temperature is not positive or the shapes do not fit.
    """
    _check_shapes(logits, ids)
    scaled = _scale(logits, temperature, suppressed)
    chosen = scaled.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return chosen - scaled.logsumexp(-1)


def token_entropy(logits: Tensor, temperature: float = 1.0, suppressed: Tensor | None = None) -> Tensor:
    """Entropy, in nats, of each next-token distribution.

    Args:
        logits: [..., V]; any float type.
        temperature: Logits are divided by it, as in sampling.
        suppressed: [S] int64, tokens that cannot be sampled.

    Returns:
        [...] float32 (float64 for float64 logits).

    Raises:
        ValueError: The temperature is not positive.
    """
    logprobs = _scale(logits, temperature, suppressed).log_softmax(-1)
    # 0 * log 0 = 0: without this a suppressed token makes the entropy, or its gradient, NaN.
    finite = logprobs.masked_fill(logprobs == -torch.inf, 0.0)
    return -(logprobs.exp() * finite).sum(-1)


def chunked_token_logprobs(
    hidden: Tensor,
    ids: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    chunk_size: int = 1024,
    temperature: float = 1.0,
    suppressed: Tensor | None = None,
    with_entropy: bool = False,
) -> TokenScores:
    """Scores tokens from hidden states without ever holding all logits.

    The head runs on ``chunk_size`` tokens at a time and again in the backward pass, so the peak is one chunk of logits
    for any number of tokens. Values and gradients are those of ``token_logprobs(head(hidden), ids)``.

    Args:
        hidden: [..., H] states from which the tokens were predicted. (Logits and an identity head work too: no full
            copy of them in float32 is made.)
        ids: [...] int64, the tokens.
        head: [tokens, H] -> [tokens, V], the family's own head with everything that belongs to it, such as
            soft-capping. It is called inside the caller's forward pass.
        chunk_size: Tokens at a time.
        temperature: Logits are divided by it.
        suppressed: [S] int64, tokens that cannot be sampled.
        with_entropy: Whether to compute entropies.

    Returns:
        Scores in the shape of ``ids``.

    Raises:
        ValueError: The chunk size or the temperature is not positive, or the shapes do not fit.
    """
    _check_shapes(hidden, ids)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")

    def score(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states)
        logprobs = token_logprobs(logits, tokens, temperature, suppressed)
        entropy = token_entropy(logits, temperature, suppressed) if with_entropy else torch.zeros_like(logprobs)
        return logprobs, entropy

    logprobs, entropies = [], []
    states = torch.split(hidden.reshape(-1, hidden.shape[-1]), chunk_size)
    tokens = torch.split(ids.reshape(-1), chunk_size)
    for chunk in zip(states, tokens, strict=True):
        scored = checkpoint(score, *chunk, use_reentrant=False) if torch.is_grad_enabled() else score(*chunk)
        logprobs.append(scored[0])
        entropies.append(scored[1])
    return TokenScores(
        torch.cat(logprobs).reshape(ids.shape),
        torch.cat(entropies).reshape(ids.shape) if with_entropy else None,
    )


def _check_shapes(scores: Tensor, ids: Tensor) -> None:
    if scores.shape[:-1] != ids.shape:
        raise ValueError(f"scores {tuple(scores.shape)} do not fit ids {tuple(ids.shape)}: expected [..., V] and [...]")


def _scale(logits: Tensor, temperature: float, suppressed: Tensor | None) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; greedy decoding is scored at temperature 1")
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        scaled = scaled / temperature
    return scaled if suppressed is None else scaled.index_fill(-1, suppressed, -torch.inf)
