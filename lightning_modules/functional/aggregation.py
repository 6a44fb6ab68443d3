"""Aggregation of per-token terms to one loss: sums over a micro-batch, divided by counts of the whole optimizer step.

Shape letters: N completions, L tokens. Masks are True where tokens count.

======== =============================== =============================================================================
loss     each completion's tokens         divided by
======== =============================== =============================================================================
dapo     summed                           tokens of the step (DAPO, arXiv 2503.14476)
cispo    summed                           tokens of the step (CISPO, arXiv 2506.13585)
dr_grpo  summed                           completions of the step x max_completion_length (Dr. GRPO, arXiv 2503.20783)
grpo     averaged                         completions of the step (GRPO, arXiv 2402.03300)
gspo     averaged                         completions of the step (GSPO, arXiv 2507.18071)
bnpo     summed                           tokens of the micro-batch, then micro-batches of the step
======== =============================== =============================================================================

Only ``bnpo`` depends on how a step is split into micro-batches: a token of a short micro-batch weighs more.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vidreason.lightning_modules.functional.reductions import count_or_one, masked_sum

LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "gspo"]
RatioLevel = Literal["token", "sequence"]
LOSS_TYPES: tuple[LossType, ...] = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "gspo")


class StepCounts(NamedTuple):
    """Counts of an optimizer step; on several ranks, whose gradients are averaged, these are means over the ranks."""

    tokens: Tensor
    """[] Tokens that count."""
    completions: Tensor
    """[] Completions of clips that count, including completions without a token that counts."""
    micro_batches: Tensor
    """[] Micro-batches with at least one clip that counts."""


def loss_normalizer(loss_type: LossType, counts: StepCounts, max_completion_length: int | None = None) -> Tensor:
    """Returns the positive number that the ``summed_terms`` of a step are divided by.

    Args:
        loss_type: Name of the loss.
        counts: Counts of the whole optimizer step.
        max_completion_length: Longest completion that can be sampled, in tokens; only ``dr_grpo`` needs it.

    Raises:
        ValueError: If the loss type is unknown, or ``dr_grpo`` is not given a length.
    """
    check_loss_type(loss_type)
    if loss_type == "dr_grpo":
        if max_completion_length is None or max_completion_length < 1:
            raise ValueError(f"dr_grpo needs a positive max_completion_length, got {max_completion_length}")
        # A constant length: dividing by each completion's own length favours long wrong answers.
        return count_or_one(counts.completions) * max_completion_length
    if loss_type in ("grpo", "gspo"):
        return count_or_one(counts.completions)
    if loss_type == "bnpo":
        return count_or_one(counts.micro_batches)
    return token_normalizer(counts)


def token_normalizer(counts: StepCounts) -> Tensor:
    """Returns the number of tokens of the step, or 1 if it is 0."""
    return count_or_one(counts.tokens)


def summed_terms(terms: Tensor, mask: Tensor, loss_type: LossType) -> Tensor:
    """Returns the sum of the terms of one micro-batch, which may be added over the micro-batches of a step.

    Args:
        terms: [N, L]; values outside the mask may be anything, including NaN.
        mask: [N, L] bool.
        loss_type: Name of the loss.

    Returns:
        [] sum; ``loss_normalizer`` is its divisor.
    """
    if loss_type in ("grpo", "gspo"):
        return (torch.where(mask, terms, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)).sum()
    if loss_type == "bnpo":
        # The mean of this micro-batch; ``loss_normalizer`` then averages over micro-batches.
        return masked_sum(terms, mask) / mask.sum().clamp(min=1)
    return masked_sum(terms, mask)


def level_of(loss_type: LossType, ratio_level: RatioLevel | None) -> RatioLevel:
    """Returns ``ratio_level``; if it is None, ``sequence`` for ``gspo`` and ``token`` for all other losses."""
    if ratio_level is not None:
        return ratio_level
    return "sequence" if loss_type == "gspo" else "token"


def log_ratio_at(level: RatioLevel, log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Returns the log-ratios of tokens, or the mean of the completion at each token (GSPO, arXiv 2507.18071, eq. 7).

    Args:
        level: ``token`` returns the log-ratios unchanged, ``sequence`` the means.
        log_ratio: [N, L] log-ratio of each token.
        mask: [N, L] bool.

    Returns:
        [N, L]; at level ``sequence``, all tokens of a completion have the same value.
    """
    if level == "token":
        return log_ratio
    # The mean of logarithms: eq. 7 has the geometric mean of the ratios.
    mean = torch.where(mask, log_ratio, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return mean.expand_as(log_ratio)


def check_loss_type(loss_type: LossType) -> None:
    """Checks that a loss type exists.

    Raises:
        ValueError: If it does not; the message lists the loss types.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
