"""How the terms of the tokens become one loss: sums over what is given, divided by counts of the whole optimizer step.

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

``bnpo`` alone depends on how a step is cut into micro-batches: a token of a short micro-batch weighs more.
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
    """What an optimizer step holds; on several ranks, whose gradients are averaged, the mean over the ranks."""

    tokens: Tensor
    """[] tokens that count"""
    completions: Tensor
    """[] completions of clips that count, those without a token that counts included"""
    micro_batches: Tensor
    """[] forwards in which a clip counts"""


def loss_normalizer(loss_type: LossType, counts: StepCounts, max_completion_length: int | None = None) -> Tensor:
    """Returns what ``summed_terms`` of a step is divided by, more than 0.

    Args:
        loss_type: Which loss.
        counts: Of the whole optimizer step.
        max_completion_length: Longest completion that can be sampled, in tokens; ``dr_grpo`` alone needs it.

    Raises:
        ValueError: The loss type is unknown, or ``dr_grpo`` is not given a length.
    """
    check_loss_type(loss_type)
    if loss_type == "dr_grpo":
        if max_completion_length is None or max_completion_length < 1:
            raise ValueError(f"dr_grpo needs a positive max_completion_length, got {max_completion_length}")
        return count_or_one(counts.completions) * max_completion_length
    if loss_type in ("grpo", "gspo"):
        return count_or_one(counts.completions)
    if loss_type == "bnpo":
        return count_or_one(counts.micro_batches)
    return token_normalizer(counts)


def token_normalizer(counts: StepCounts) -> Tensor:
    """Returns the tokens of the step, 1 where there are none."""
    return count_or_one(counts.tokens)


def summed_terms(terms: Tensor, mask: Tensor, loss_type: LossType) -> Tensor:
    """Adds up the terms of one micro-batch as the loss type says; sums of micro-batches add up.

    Args:
        terms: [N, L]; what the mask leaves out may hold anything.
        mask: [N, L] bool.
        loss_type: Which loss.

    Returns:
        [] to be divided by ``loss_normalizer``.
    """
    if loss_type in ("grpo", "gspo"):
        return (torch.where(mask, terms, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)).sum()
    if loss_type == "bnpo":
        return masked_sum(terms, mask) / mask.sum().clamp(min=1)
    return masked_sum(terms, mask)


def level_of(loss_type: LossType, ratio_level: RatioLevel | None) -> RatioLevel:
    """Returns the level of the ratio: what is asked for, else sequence for ``gspo`` and token for all others."""
    if ratio_level is not None:
        return ratio_level
    return "sequence" if loss_type == "gspo" else "token"


def log_ratio_at(level: RatioLevel, log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Returns the log-ratios as they are, or gives every token its completion's mean (GSPO, arXiv 2507.18071, eq. 7).

    Args:
        level: Of the ratio.
        log_ratio: [N, L] per token.
        mask: [N, L] bool.

    Returns:
        [N, L]; at level ``sequence`` the same along L.
    """
    if level == "token":
        return log_ratio
    mean = torch.where(mask, log_ratio, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return mean.expand_as(log_ratio)


def check_loss_type(loss_type: LossType) -> None:
    """Refuses what is no loss type.

    Raises:
        ValueError: Naming those that there are.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
