"""Per-token terms of policy objectives, before aggregation.

Shape letters: N completions, L tokens. A ratio is policy / old, an advantage is [N, 1] or [N, L].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Bounds(NamedTuple):
    """Bounds beyond which a ratio is clipped."""

    lower: float
    upper: float
    dual: float
    """Upper bound for tokens with a negative advantage; infinite without dual clip."""

    @classmethod
    def of(
        cls, loss_type: str, clip_eps_low: float, clip_eps_high: float, cispo_clip_max: float, dual_clip: float | None
    ) -> Bounds:
        """Returns the bounds of a loss type; ``cispo`` has only an upper bound."""
        if loss_type == "cispo":
            return cls(-math.inf, cispo_clip_max, math.inf)
        return cls(1 - clip_eps_low, 1 + clip_eps_high, math.inf if dual_clip is None else dual_clip)


class ClipMasks(NamedTuple):
    """Tokens whose ratio is beyond a bound that clips them, given the sign of their advantage."""

    low: Tensor
    """[N, L] Negative advantage and a ratio below the lower bound."""
    high: Tensor
    """[N, L] Positive advantage and a ratio above the upper bound."""
    dual: Tensor
    """[N, L] Negative advantage and a ratio above the dual bound."""


def clipped_terms(ratio: Tensor, advantage: Tensor, bounds: Bounds) -> Tensor:
    """Returns ``-min(r A, clip(r) A)`` (PPO, arXiv 1707.06347), for A < 0 at most ``-dual A`` (arXiv 1912.09729).

    Args:
        ratio: [N, L].
        advantage: [N, 1].
        bounds: Bounds of the ratio.

    Returns:
        [N, L].
    """
    terms = -torch.minimum(ratio * advantage, ratio.clamp(bounds.lower, bounds.upper) * advantage)
    # For A < 0 the clip above does not limit large ratios: the term -r A grows with r.
    if bounds.dual == math.inf:
        return terms
    return torch.where(advantage < 0, torch.minimum(terms, -bounds.dual * advantage), terms)


def cispo_terms(ratio: Tensor, advantage: Tensor, logprobs: Tensor, bounds: Bounds) -> Tensor:
    """Returns ``-min(r, upper) A log policy`` with gradient through the logarithm only (CISPO, arXiv 2506.13585).

    Args:
        ratio: [N, L].
        advantage: [N, 1].
        logprobs: [N, L] log-probabilities of the policy.
        bounds: Bounds of the ratio.

    Returns:
        [N, L].
    """
    return -ratio.clamp(max=bounds.upper).detach() * advantage * logprobs


def k3_terms(log_rho: Tensor) -> Tensor:
    """Returns ``rho - log rho - 1``, the non-negative k3 estimate of KL(policy, reference) (arXiv 2402.03300, eq. 4).

    Args:
        log_rho: [N, L] log(reference / policy).

    Returns:
        [N, L].
    """
    return log_rho.exp() - log_rho - 1


def clip_masks(ratio: Tensor, advantage: Tensor, bounds: Bounds) -> ClipMasks:
    """Returns the tokens whose ratio is beyond a bound.

    Args:
        ratio: [N, L].
        advantage: [N, 1].
        bounds: Bounds of the ratio.
    """
    negative = advantage < 0
    return ClipMasks(
        low=(ratio < bounds.lower) & negative,
        high=(ratio > bounds.upper) & (advantage > 0),
        dual=(ratio > bounds.dual) & negative,
    )


def largest_gap(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Returns the largest |old_logprobs - rollout_logprobs| of the tokens that count; 0 if there are none.

    Args:
        old_logprobs: [N, L] log-probabilities of the trainer.
        rollout_logprobs: [N, L] log-probabilities of the sampler.
        mask: [N, L] bool.
    """
    if not mask.numel():
        return old_logprobs.new_zeros(())
    return torch.where(mask, (old_logprobs - rollout_logprobs).abs(), 0.0).amax()
