"""Log-probabilities and entropies of tokens, from logits or from hidden states in chunks.

Shape letters: V vocabulary, H hidden size; leading dimensions are free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class TokenScores(NamedTuple):
    """Scores of given tokens under the model."""

    logprobs: Tensor
    """[...] At least float32."""
    greedy: Tensor
    """[...] 1 where the token is the likeliest, else 0; no gradient."""
    entropy: Tensor | None
    """[...] Entropy in nats of the distribution that predicts the token; None if it was not requested."""


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0, suppressed: Tensor | None = None) -> Tensor:
    """Returns the log-probability of each given token.

    Args:
        logits: [..., V]; any float type.
        ids: [...] int64, the tokens.
        temperature: Logits are divided by it, as in sampling.
        suppressed: [S] int64, tokens that cannot be sampled: they get probability 0 before normalisation, so that a
            given token among them has log-probability -inf.

    Returns:
        [...] float32 (float64 for float64 logits).

    Raises:
        ValueError: If the temperature is not positive or the shapes do not fit.
    """
    _check_shapes(logits, ids)
    scaled = _scale(logits, temperature, suppressed)
    chosen = scaled.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return chosen - scaled.logsumexp(-1)


def chunked_token_logprobs(
    hidden: Tensor,
    ids: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    chunk_size: int = 128,
    temperature: float = 1.0,
    suppressed: Tensor | None = None,
    with_entropy: bool = False,
    state: Tensor | None = None,
) -> TokenScores:
    """Scores tokens from hidden states while holding the logits of one chunk only.

    The head runs on ``chunk_size`` states at a time. If there are several chunks, it runs again in the backward pass,
    so that peak memory is one chunk of logits for any number of tokens. Values and gradients equal those of
    ``token_logprobs(head(hidden), ids)``.

    Args:
        hidden: [..., H] states from which the tokens were predicted.
        ids: [...] int64, the tokens; [K] with ``state``.
        head: [states, H] -> [states, V], the head of the model family, including soft-capping. It is called inside the
            caller's forward pass.
        chunk_size: States per chunk.
        temperature: Logits are divided by it.
        suppressed: [S] int64, tokens that cannot be sampled.
        with_entropy: Whether to compute entropies too, in the same pass.
        state: [K] int64 on the CPU, non-decreasing: the index of the state [M, H] that predicts each token. Tokens
            may share a state, for which the head then runs once. None: one state per token.

    Returns:
        Scores in the shape of ``ids``.

    Raises:
        ValueError: If the chunk size or the temperature is not positive, or the shapes do not fit.
    """
    if state is None:
        _check_shapes(hidden, ids)
    elif state.shape != ids.shape or hidden.ndim != 2 or (len(state) and bool((state.diff() < 0).any())):
        raise ValueError(f"state {tuple(state.shape)} must be non-decreasing and fit ids {tuple(ids.shape)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")

    def score(states: Tensor, tokens: Tensor, place: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        scaled = _scale(head(states), temperature, suppressed)
        chosen = _chosen(scaled, tokens, place)
        greedy = (chosen >= _at(scaled.amax(-1), place)).to(scaled.dtype)  # a tie counts as greedy
        if not with_entropy:
            return chosen - _at(scaled.logsumexp(-1), place), greedy, scaled.new_zeros(tokens.shape)
        logprobs = scaled.log_softmax(-1)
        return _chosen(logprobs, tokens, place), greedy, _at(_entropy(logprobs), place)

    states = torch.split(hidden.reshape(-1, hidden.shape[-1]), chunk_size)
    tokens, places = _per_chunk(ids.reshape(-1), state, len(states), chunk_size)
    scored = []
    for chunk in zip(states, tokens, places, strict=True):
        again = torch.is_grad_enabled() and len(states) > 1
        scored.append(checkpoint(score, *chunk, use_reentrant=False) if again else score(*chunk))
    logprobs, greedy, entropy = (torch.cat(parts).reshape(ids.shape) for parts in zip(*scored, strict=True))
    return TokenScores(logprobs, greedy, entropy if with_entropy else None)


def _per_chunk(
    ids: Tensor, state: Tensor | None, chunks: int, chunk_size: int
) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """Splits the tokens where the states are split, and returns the index of each token's state in its chunk."""
    if state is None:
        return torch.split(ids, chunk_size), [None] * chunks
    ends = torch.searchsorted(state, torch.arange(1, chunks + 1) * chunk_size).tolist()
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    place = (state % chunk_size).to(ids.device)
    return torch.split(ids, sizes), torch.split(place, sizes)


def _chosen(scores: Tensor, ids: Tensor, place: Tensor | None) -> Tensor:
    return scores.gather(-1, ids.unsqueeze(-1)).squeeze(-1) if place is None else scores[place, ids]


def _at(values: Tensor, place: Tensor | None) -> Tensor:
    return values if place is None else values[place]


def _entropy(logprobs: Tensor) -> Tensor:
    # 0 * log 0 = 0: without this, a suppressed token would make the entropy or its gradient NaN.
    finite = logprobs.masked_fill(logprobs == -torch.inf, 0.0)
    return -(logprobs.exp() * finite).sum(-1)


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
