"""The losses of all stages.

Shape letters: N texts, L tokens. Masks are True where tokens count. Every loss is the sum over a micro-batch divided by
a count of the whole optimizer step, so that accumulated gradients do not depend on the micro-batches. Gradients are
averaged over ranks, so on several ranks the count is that of all ranks divided by the number of ranks.

GRPO follows DeepIntuit (arXiv 2603.10300); the other loss types follow the papers in ``functional/aggregation.py``.
Deviations from the papers:
    1. The log-ratios of the policy term, the KL term and the importance weights are clamped (``log_ratio_clamp``).

Text fine-tuning follows RB-FT (arXiv 2511.15923) and DeepIntuit's cold start. Deviations from the papers:
    1. Reasoning and answer are averaged separately, then added: in one mean over all tokens, the few tokens of an
       answer would have almost no weight behind a long trace. ``answer_weight=None`` gives the papers' mean.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vidreason.lightning_modules.functional.aggregation import (
    LossType,
    RatioLevel,
    check_loss_type,
    level_of,
    log_ratio_at,
    summed_terms,
)
from vidreason.lightning_modules.functional.policy_terms import (
    Bounds,
    ClipMasks,
    cispo_terms,
    clip_masks,
    clipped_terms,
    k3_terms,
)
from vidreason.lightning_modules.functional.reductions import count_or_one, masked_sum


class PolicyLossOutput(NamedTuple):
    """Loss and statistics of one micro-batch, all of shape []; only ``loss`` has a gradient.

    Every field is divided by a count of the whole optimizer step, so that fields are added over its micro-batches.
    ``loss`` and ``policy`` are aggregated by the loss type; all other fields are means over the tokens of the step.
    """

    loss: Tensor
    """``policy`` + kl_coef * KL - entropy_coef * entropy; the KL is aggregated like the policy term."""
    policy: Tensor
    kl: Tensor
    """Token mean of the k3 estimate of KL(policy, reference); 0 without a reference."""
    entropy: Tensor
    """Token mean in nats; 0 without entropies."""
    clip_low: Tensor
    """Share of tokens with a negative advantage whose ratio fell below 1 - clip_eps_low; 0 for cispo."""
    clip_high: Tensor
    """Share of tokens with a positive advantage whose ratio rose above 1 + clip_eps_high (cispo: cispo_clip_max)."""
    clip_region: Tensor
    """clip_low + clip_high: share of tokens whose policy gradient is clipped to 0 (cispo: bounded)."""
    dual_clip: Tensor
    """Share of tokens with a negative advantage whose ratio rose above dual_clip; 0 for cispo."""
    importance: Tensor
    """Mean truncated importance weight; 1 without importance sampling."""
    rollout_gap: Tensor
    """Mean |old_logprobs - rollout_logprobs| (trainer against sampler); 0 without rollout_logprobs."""


class TextLoss(NamedTuple):
    """Loss of one micro-batch of texts, to be added over micro-batches; all [], only ``loss`` has a gradient."""

    loss: Tensor
    reasoning: Tensor
    """Mean negative log-probability of the tokens outside the answer; 0 if there are none."""
    answer: Tensor
    """Mean negative log-probability of the tokens of the answer; 0 if there are none."""


def grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    normalizer: float | Tensor,
    token_count: float | Tensor | None = None,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    loss_type: LossType = "dapo",
    ratio_level: RatioLevel | None = None,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.28,
    cispo_clip_max: float = 5.0,
    dual_clip: float | None = 3.0,
    importance_sampling: bool = True,
    importance_cap: float | None = 2.0,
    kl_coef: float = 0.0,
    kl_bias_correction: bool = False,
    entropy_coef: float = 0.0,
    log_ratio_clamp: float = 20.0,
) -> PolicyLossOutput:
    """Computes the policy loss with its KL and entropy terms.

    With r = policy / old, the policy term of a token is ``-min(r A, clip(r, 1 - low, 1 + high) A)``, for A < 0 at most
    ``-dual_clip A``; for ``cispo`` it is ``-min(r, cispo_clip_max) A log policy`` with the gradient through the
    logarithm only. It is multiplied by ``min(old / rollout, importance_cap)``. The KL term is ``rho - log rho - 1``
    with rho = reference / policy, times r with ``kl_bias_correction``. The terms are aggregated as described in
    ``functional/aggregation.py``.

    Args:
        logprobs: [N, L] log-probabilities of the trained policy.
        advantages: [N] advantage of each completion, shared by its tokens.
        completion_mask: [N, L] bool; values of other tensors outside it may be anything.
        normalizer: ``loss_normalizer`` of the whole optimizer step; for ``dapo`` and ``cispo`` its number of tokens.
        token_count: Tokens of the optimizer step, the divisor of entropy and statistics. None: ``normalizer``.
        old_logprobs: [N, L] of the trainer at the time of the rollout. None: ``logprobs`` without gradient, which is
            equal if each rollout batch is used for one optimizer step.
        rollout_logprobs: [N, L] of the sampler, for truncated importance sampling. None: no correction.
        ref_logprobs: [N, L] of the policy at the start of the stage. None: no KL term.
        entropy: [N, L] entropies in nats. None: no entropy term.
        loss_type: Aggregation of the terms; ``cispo`` also has a policy term of its own.
        ratio_level: ``sequence`` uses one ratio per completion, the geometric mean over its tokens. None: ``sequence``
            for ``gspo``, ``token`` for all others.
        clip_eps_low: Ratios are clipped below 1 - clip_eps_low.
        clip_eps_high: Ratios are clipped above 1 + clip_eps_high.
        cispo_clip_max: Upper bound of the ratio in ``cispo``.
        dual_clip: Upper bound of the ratio for tokens with a negative advantage. None: unlimited.
        importance_sampling: If False, the gap to ``rollout_logprobs`` is measured but not corrected.
        importance_cap: Upper bound of the importance weight. None: unlimited.
        kl_coef: Weight of the KL term.
        kl_bias_correction: Whether to multiply the KL term by the ratio, which keeps the estimate unbiased off-policy.
        entropy_coef: Weight of the entropy bonus.
        log_ratio_clamp: Largest absolute value of a log-ratio before it is exponentiated.

    Returns:
        The loss, ready for ``backward``, and statistics.

    Raises:
        ValueError: If shapes do not fit, a coefficient is out of range, or a coefficient is set without its tensor.
    """
    _check_shapes(completion_mask, logprobs, old_logprobs, rollout_logprobs, ref_logprobs, entropy)
    _check_grpo(advantages, completion_mask, normalizer, dual_clip, importance_cap, cispo_clip_max)
    _check_terms(kl_coef, ref_logprobs, entropy_coef, entropy)
    tokens = _token_count(loss_type, normalizer, token_count)

    def log_ratio(upper: Tensor, lower: Tensor) -> Tensor:
        # Masked here as well as in the sums, so that no padding reaches exp: the gradient of exp at infinity is NaN.
        return torch.where(completion_mask, upper - lower, 0.0)

    def clamped(values: Tensor) -> Tensor:
        return values.clamp(-log_ratio_clamp, log_ratio_clamp)

    def term(values: Tensor) -> Tensor:
        return summed_terms(values, completion_mask, loss_type) / normalizer

    def mean(values: Tensor) -> Tensor:
        return masked_sum(values, completion_mask) / tokens

    # Without old log-probs the ratio is 1 in value, but it still carries the policy gradient.
    old = logprobs.detach() if old_logprobs is None else old_logprobs.detach()
    advantage = advantages.detach().to(logprobs.dtype).unsqueeze(-1)
    level = level_of(loss_type, ratio_level)
    ratio = clamped(log_ratio_at(level, log_ratio(logprobs, old), completion_mask)).exp()
    bounds = Bounds.of(loss_type, clip_eps_low, clip_eps_high, cispo_clip_max, dual_clip)
    if loss_type == "cispo":
        policy = cispo_terms(ratio, advantage, logprobs, bounds)
    else:
        policy = clipped_terms(ratio, advantage, bounds)
    importance, gap = torch.ones_like(ratio), torch.zeros_like(ratio)
    if rollout_logprobs is not None:
        mismatch = clamped(log_ratio(old, rollout_logprobs.detach()))
        gap = mismatch.abs()
        if importance_sampling:
            importance = mismatch.exp().clamp(max=math.inf if importance_cap is None else importance_cap)
            policy = policy * importance

    zero = logprobs.new_zeros(())
    policy_term, kl_term, kl_mean, entropy_mean = term(policy), zero, zero, zero
    if ref_logprobs is not None:
        kl = k3_terms(clamped(log_ratio(ref_logprobs.detach(), logprobs)))
        kl = kl * ratio if kl_bias_correction else kl
        kl_term, kl_mean = term(kl), mean(kl.detach())
    if entropy is not None:
        entropy_mean = mean(entropy)
    clipped = ClipMasks(*(mean(beyond.to(ratio.dtype)) for beyond in clip_masks(ratio.detach(), advantage, bounds)))
    return PolicyLossOutput(
        loss=policy_term + kl_coef * kl_term - entropy_coef * entropy_mean,
        policy=policy_term.detach(),
        kl=kl_mean,
        entropy=entropy_mean.detach(),
        clip_low=clipped.low,
        clip_high=clipped.high,
        clip_region=clipped.low + clipped.high,
        dual_clip=clipped.dual,
        importance=mean(importance),
        rollout_gap=mean(gap),
    )


def weighted_text_loss(
    logprobs: Tensor,
    loss_mask: Tensor,
    answer_mask: Tensor,
    *,
    answer_weight: float | None,
    reasoning_count: float | Tensor,
    answer_count: float | Tensor,
) -> TextLoss:
    """Computes the negative log-likelihood of target texts.

    The loss is ``mean over reasoning tokens + answer_weight * mean over answer tokens``. For targets without an answer
    block (labels, rationales), only the first mean remains.

    Args:
        logprobs: [N, L]; values outside ``loss_mask`` may be anything.
        loss_mask: [N, L] bool, tokens that count.
        answer_mask: [N, L] bool, tokens from ``<answer>`` to the end of turn.
        answer_weight: Weight of the answer's mean. None: one mean over all tokens.
        reasoning_count: Tokens outside answers in the whole optimizer step; may be 0.
        answer_count: Tokens in answers in the whole optimizer step; may be 0.

    Returns:
        The loss, ready for ``backward``, and its two means.

    Raises:
        ValueError: If shapes do not fit.
    """
    _check_shapes(loss_mask, logprobs, answer_mask)
    reasoning_sum = -masked_sum(logprobs, loss_mask & ~answer_mask)
    answer_sum = -masked_sum(logprobs, loss_mask & answer_mask)
    reasoning = reasoning_sum / _nonzero(reasoning_count, logprobs)
    answer = answer_sum / _nonzero(answer_count, logprobs)
    if answer_weight is None:
        loss = (reasoning_sum + answer_sum) / _nonzero(reasoning_count + answer_count, logprobs)
    else:
        loss = reasoning + answer_weight * answer
    return TextLoss(loss, reasoning.detach(), answer.detach())


def _nonzero(count: float | Tensor, like: Tensor) -> Tensor:
    """Returns the count in the dtype and on the device of ``like``, or 1 if it is 0."""
    return count_or_one(torch.as_tensor(count, dtype=like.dtype, device=like.device))


def _check_shapes(mask: Tensor, *tensors: Tensor | None) -> None:
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(f"the mask must be bool [N, L], got {mask.dtype} {tuple(mask.shape)}")
    for tensor in tensors:
        if tensor is not None and tensor.shape != mask.shape:
            raise ValueError(f"expected {tuple(mask.shape)} as the mask, got {tuple(tensor.shape)}")


def _check_grpo(
    advantages: Tensor,
    completion_mask: Tensor,
    normalizer: float | Tensor,
    dual_clip: float | None,
    importance_cap: float | None,
    cispo_clip_max: float,
) -> None:
    if advantages.shape != completion_mask.shape[:1]:
        raise ValueError(f"advantages must be [{completion_mask.shape[0]}], got {tuple(advantages.shape)}")
    if not isinstance(normalizer, Tensor) and not normalizer > 0:
        raise ValueError(f"normalizer must be positive, got {normalizer}: the step has no completion tokens")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be greater than 1 (or null), got {dual_clip}")
    if importance_cap is not None and importance_cap <= 0:
        raise ValueError(f"importance_cap must be positive (or null), got {importance_cap}")
    if cispo_clip_max <= 0:
        raise ValueError(f"cispo_clip_max must be positive, got {cispo_clip_max}")


def _check_terms(kl_coef: float, ref_logprobs: Tensor | None, entropy_coef: float, entropy: Tensor | None) -> None:
    if kl_coef != 0 and ref_logprobs is None:
        raise ValueError(
            f"kl_coef is {kl_coef} but there are no ref_logprobs: score the reference policy or set it to 0"
        )
    if entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy_coef is {entropy_coef} but there is no entropy: score with entropy or set it to 0")


def _token_count(loss_type: LossType, normalizer: float | Tensor, token_count: float | Tensor | None) -> float | Tensor:
    check_loss_type(loss_type)
    if token_count is not None:
        return token_count
    if loss_type not in ("dapo", "cispo"):
        raise ValueError(f"the normalizer of {loss_type} is no number of tokens: give token_count for the statistics")
    return normalizer
