"""What every token contributes to a policy objective, before anything is added up.

Shape letters: N completions, L tokens. A ratio is policy / old, an advantage is [N, 1] or [N, L].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Bounds(NamedTuple):
    """Where ratios stop counting."""

    lower: float
    upper: float
    dual: float
    """Against a token with a negative advantage; infinite where there is no dual clip"""

    @classmethod
    def of(
        cls, loss_type: str, clip_eps_low: float, clip_eps_high: float, cispo_clip_max: float, dual_clip: float | None
    ) -> Bounds:
        """Returns the bounds of a loss type; ``cispo`` has an upper one only."""
        if loss_type == "cispo":
            return cls(-math.inf, cispo_clip_max, math.inf)
        return cls(1 - clip_eps_low, 1 + clip_eps_high, math.inf if dual_clip is None else dual_clip)


class ClipMasks(NamedTuple):
    """Which tokens lie beyond a bound, on the side where it matters."""

    low: Tensor
    """[N, L] negative advantage, ratio below the lower bound"""
    high: Tensor
    """[N, L] positive advantage, ratio above the upper bound"""
    dual: Tensor
    """[N, L] negative advantage, ratio above the dual bound"""


def clipped_terms(ratio: Tensor, advantage: Tensor, bounds: Bounds) -> Tensor:
    """``-min(r A, clip(r) A)`` (PPO, arXiv 1707.06347), for A < 0 at most ``-dual A`` (dual clip, arXiv 1912.09729).

    Args:
        ratio: [N, L].
        advantage: [N, 1].
        bounds: Of the ratio.

    Returns:
        [N, L].
    """
    terms = -torch.minimum(ratio * advantage, ratio.clamp(bounds.lower, bounds.upper) * advantage)
    if bounds.dual == math.inf:
        return terms
    return torch.where(advantage < 0, torch.minimum(terms, -bounds.dual * advantage), terms)


def cispo_terms(ratio: Tensor, advantage: Tensor, logprobs: Tensor, bounds: Bounds) -> Tensor:
    """``-min(r, upper) A log policy``, the gradient through the logarithm alone (CISPO, arXiv 2506.13585).

    Args:
        ratio: [N, L].
        advantage: [N, 1].
        logprobs: [N, L] of the policy.
        bounds: Of the ratio.

    Returns:
        [N, L].
    """
    return -ratio.clamp(max=bounds.upper).detach() * advantage * logprobs


def k3_terms(log_rho: Tensor) -> Tensor:
    """``rho - log rho - 1`` with rho = reference / policy: an estimate of KL(policy, reference) that is never negative.

    Args:
        log_rho: [N, L].

    Returns:
        [N, L].
    """
    return log_rho.exp() - log_rho - 1


def clip_masks(ratio: Tensor, advantage: Tensor, bounds: Bounds) -> ClipMasks:
    """Says where the bounds are passed.

    Args:
        ratio: [N, L].
        advantage: [N, 1].
        bounds: Of the ratio.
    """
    negative = advantage < 0
    return ClipMasks(
        low=(ratio < bounds.lower) & negative,
        high=(ratio > bounds.upper) & (advantage > 0),
        dual=(ratio > bounds.dual) & negative,
    )


def largest_gap(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Returns the largest |old_logprobs - rollout_logprobs| of the tokens that count; 0 where there are none.

    Args:
        old_logprobs: [N, L] of the trainer.
        rollout_logprobs: [N, L] of the sampler.
        mask: [N, L] bool.
    """
    if not mask.numel():
        return old_logprobs.new_zeros(())
    return torch.where(mask, (old_logprobs - rollout_logprobs).abs(), 0.0).amax()
