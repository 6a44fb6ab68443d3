"""The policy loss as a configurable object: its coefficients and the record of its inputs.

The mathematics is in ``functional/losses.py``. For another loss, subclass :class:`PolicyLoss`, override ``__call__``
(and add coefficients), and name the class in YAML by ``loss: {class_path: …}``; docs/extending.md has an example.

Shape letters: N completions of a micro-batch, L tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vidreason.lightning_modules.functional.aggregation import (
    LossType,
    RatioLevel,
    StepCounts,
    check_loss_type,
    loss_normalizer,
    token_normalizer,
)
from vidreason.lightning_modules.functional.losses import PolicyLossOutput, grpo_loss

AdvantageScale = Literal["group", "batch", "none"]


@dataclass(frozen=True)
class LossInputs:
    """The inputs of a policy loss for one micro-batch of an optimizer step."""

    logprobs: Tensor
    """[N, L] log-probabilities of the trained policy; only this tensor and ``entropy`` have gradients."""
    advantages: Tensor
    """[N] advantage of each completion."""
    completion_mask: Tensor
    """[N, L] bool, tokens that count; values of other tensors outside it may be anything."""
    counts: StepCounts
    """Tokens, completions and micro-batches of the whole optimizer step, as means over the ranks."""
    max_completion_length: int
    """Longest completion that can be sampled, in tokens."""
    rollout_logprobs: Tensor
    """[N, L] log-probabilities of the sampler."""
    old_logprobs: Tensor | None = None
    """[N, L] of the trainer at the time of the rollout; None if ``logprobs`` without gradient are equal."""
    ref_logprobs: Tensor | None = None
    """[N, L] log-probabilities of the policy at the start of the stage; None unless ``needs_reference``."""
    entropy: Tensor | None = None
    """[N, L] entropies in nats of the predicting distributions; None unless ``needs_entropy``."""


@dataclass(frozen=True)
class PolicyLoss:
    """The policy loss of GRPO and its variants, with KL and entropy terms.

    Args:
        type: Aggregation of the terms of tokens: grpo, dr_grpo, dapo, bnpo, cispo or gspo.
        ratio_level: One ratio per ``token`` or per ``sequence``; null is sequence for gspo, token for all others.
        clip_eps_low: Ratios are clipped below 1 - clip_eps_low.
        clip_eps_high: Ratios are clipped above 1 + clip_eps_high.
        cispo_clip_max: Upper bound of the ratio in cispo.
        dual_clip: Upper bound of the ratio for tokens with a negative advantage; null is unlimited.
        importance_cap: Upper bound of the weight that corrects the gap between sampler and trainer; null disables the
            correction.
        kl_coef: Weight of the KL to the policy at the start of the stage.
        kl_bias_correction: Multiply the KL term by the ratio, which keeps its estimate unbiased off-policy.
        entropy_coef: Weight of the entropy bonus.
        advantage_scale: Divide advantages by the standard deviation of the ``group``, the ``batch`` or ``none``; null
            is none for dr_grpo, group for all others.
        mask_truncated: Leave completions that were truncated at ``max_new_tokens`` out of the loss.
    """

    type: LossType = "dapo"
    ratio_level: RatioLevel | None = None
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.28
    cispo_clip_max: float = 5.0
    dual_clip: float | None = 3.0
    importance_cap: float | None = 2.0
    kl_coef: float = 0.0
    kl_bias_correction: bool = False
    entropy_coef: float = 0.0
    advantage_scale: AdvantageScale | None = None
    mask_truncated: bool = False

    def __post_init__(self) -> None:
        check_loss_type(self.type)
        for name, value in vars(self).items():
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"loss.{name} must be a number, got {value}")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"loss.dual_clip must be greater than 1 (or null), got {self.dual_clip}")
        if self.importance_cap is not None and self.importance_cap <= 0:
            raise ValueError(f"loss.importance_cap must be positive (or null), got {self.importance_cap}")
        if self.cispo_clip_max <= 0:
            raise ValueError(f"loss.cispo_clip_max must be positive, got {self.cispo_clip_max}")

    @property
    def needs_reference(self) -> bool:
        """True if the loss needs the log-probabilities of the policy at the start of the stage."""
        return self.kl_coef != 0

    @property
    def needs_entropy(self) -> bool:
        """True if the loss needs the entropies of the predicting distributions."""
        return self.entropy_coef != 0

    @property
    def scale(self) -> AdvantageScale:
        """The option ``advantage_scale``, or its default for the loss type."""
        return self.advantage_scale or ("none" if self.type == "dr_grpo" else "group")

    def __call__(self, inputs: LossInputs) -> PolicyLossOutput:
        """Returns the loss of a micro-batch, divided by the counts of the whole optimizer step."""
        return grpo_loss(
            inputs.logprobs,
            inputs.advantages,
            inputs.completion_mask,
            normalizer=loss_normalizer(self.type, inputs.counts, inputs.max_completion_length),
            token_count=token_normalizer(inputs.counts),
            old_logprobs=inputs.old_logprobs,
            rollout_logprobs=inputs.rollout_logprobs,
            ref_logprobs=inputs.ref_logprobs,
            entropy=inputs.entropy,
            loss_type=self.type,
            ratio_level=self.ratio_level,
            clip_eps_low=self.clip_eps_low,
            clip_eps_high=self.clip_eps_high,
            cispo_clip_max=self.cispo_clip_max,
            dual_clip=self.dual_clip,
            # Without a cap, ``grpo_loss`` still measures the gap between sampler and trainer.
            importance_sampling=self.importance_cap is not None,
            importance_cap=self.importance_cap,
            kl_coef=self.kl_coef,
            kl_bias_correction=self.kl_bias_correction,
            entropy_coef=self.entropy_coef,
        )
