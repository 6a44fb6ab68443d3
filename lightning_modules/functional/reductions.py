"""Sums, counts and averages: tokens to sequences, labels to probabilities, traces to one decision per clip.

Shape letters: B clips, N texts, L tokens, C classes. Masks are True where things count; values outside a mask may be
anything, including NaN. Sums therefore use ``torch.where``: multiplying by the mask would keep the NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of tokens that a loss is averaged over."""

    reasoning: Tensor
    """[] int64, tokens that count outside the answer."""
    answer: Tensor
    """[] int64, tokens that count inside the answer."""

    @property
    def total(self) -> Tensor:
        """[] int64, the number of all tokens that count."""
        return self.reasoning + self.answer


def count_tokens(loss_mask: Tensor, answer_mask: Tensor) -> TokenCounts:
    """Counts the tokens of one micro-batch.

    Args:
        loss_mask: [N, L] bool.
        answer_mask: [N, L] bool.
    """
    answer = (loss_mask & answer_mask).sum()
    return TokenCounts(loss_mask.sum() - answer, answer)


def count_or_one(count: Tensor) -> Tensor:
    """Returns the count, or 1 where it is 0, so that the mean over nothing is 0 and not NaN.

    Counts below 1 are kept: the mean over two ranks, one of which has a single token, is 0.5.
    """
    return torch.where(count > 0, count, torch.ones_like(count))


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the sum of the values that count, []; 0 if none does.

    Args:
        values: [...].
        mask: [...] bool.
    """
    return torch.where(mask, values, 0.0).sum()


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Returns the log-likelihood of each text.

    Args:
        logprobs: [N, L].
        mask: [N, L] bool, tokens of the text, including the end of turn.

    Returns:
        [N]; 0 for a text without tokens.
    """
    return torch.where(mask, logprobs, 0.0).sum(-1)


def label_log_probabilities(scores: Tensor) -> Tensor:
    """Returns closed-set log-probabilities from the log-likelihood of each label's string.

    Args:
        scores: [..., C] log-likelihoods summed over tokens, not averaged: the probability of a label is that of its
            whole string, for any number of tokens.

    Returns:
        [..., C] at least float32; the exponentials sum to 1.
    """
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(-1)


def average_over_traces(log_probabilities: Tensor, owner: Tensor, batch_size: int) -> Tensor:
    """Averages the probabilities over the traces of each clip, in log space.

    Probabilities are averaged, not log-probabilities, so that one trace that misreads the video cannot veto a class.

    Args:
        log_probabilities: [N, C], one row per trace.
        owner: [N] int64, the clip of each trace; clips may have different numbers of traces, in any order.
        batch_size: Number of clips, B.

    Returns:
        [B, C] logarithms of the mean probabilities.

    Raises:
        ValueError: If a clip has no trace.
    """
    traces = torch.zeros(batch_size, dtype=torch.int64, device=owner.device).index_add(0, owner, torch.ones_like(owner))
    if bool((traces == 0).any()):
        empty = (traces == 0).nonzero().flatten().tolist()
        raise ValueError(f"clips {empty} of the batch have no trace to average: sample at least one per clip")
    classes = log_probabilities.shape[-1]
    # The maximum is subtracted before exp, as in logsumexp. It cancels, so that it needs no gradient.
    top = log_probabilities.new_full((batch_size, classes), -torch.inf)
    rows = owner.unsqueeze(-1).expand_as(log_probabilities)
    top = top.scatter_reduce(0, rows, log_probabilities.detach(), "amax")
    top = top.masked_fill(top == -torch.inf, 0.0)  # -inf - -inf would be NaN; such a class stays at probability 0
    scaled = (log_probabilities - top[owner]).exp()
    total = scaled.new_zeros(batch_size, classes).index_add(0, owner, scaled)
    return total.log() + top - traces.unsqueeze(-1).log()
