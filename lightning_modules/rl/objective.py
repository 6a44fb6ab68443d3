"""The policy loss as an object: its coefficients, and a record of inputs and of outputs.

The mathematics is in ``functional/losses.py``. A loss of one's own is a subclass of :class:`PolicyLoss` that overrides
``__call__`` (and adds coefficients), named in YAML by ``loss: {class_path: …}``; docs/extending.md has a complete file.

Shape letters: N completions of a micro-batch, L tokens.
"""

from __future__ import annotations

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
    """What a policy loss is computed from, for one micro-batch of an optimizer step."""

    logprobs: Tensor
    """[N, L] log-probabilities of the policy that is trained; the only tensor with a gradient besides ``entropy``."""
    advantages: Tensor
    """[N] one per completion."""
    completion_mask: Tensor
    """[N, L] bool, tokens that count; what it leaves out may hold anything."""
    counts: StepCounts
    """Tokens, completions and micro-batches of the whole optimizer step, as a mean over the ranks."""
    max_completion_length: int
    """Longest completion that can be sampled, in tokens."""
    rollout_logprobs: Tensor
    """[N, L] log-probabilities of the sampler."""
    old_logprobs: Tensor | None = None
    """[N, L] of the trainer at the time of the rollout; None where ``logprobs`` without gradient are the same."""
    ref_logprobs: Tensor | None = None
    """[N, L] of the policy at the start of the stage; None unless ``PolicyLoss.needs_reference``."""
    entropy: Tensor | None = None
    """[N, L] of the predicting distributions; None unless ``PolicyLoss.needs_entropy``."""


@dataclass(frozen=True)
class PolicyLoss:
    """Policy, KL and entropy terms of GRPO and its relatives.

    Args:
        type: grpo, dr_grpo, dapo, bnpo, cispo or gspo: how the terms of the tokens are added up.
        ratio_level: One ratio per ``token`` or per ``sequence``; null is sequence for gspo, token for all others.
        clip_eps_low: The ratio is clipped below 1 - this.
        clip_eps_high: The ratio is clipped above 1 + this.
        cispo_clip_max: Largest ratio of cispo, an absolute bound.
        dual_clip: Largest ratio that counts against a token with a negative advantage; null is unlimited.
        importance_cap: Largest weight for the gap between sampler and trainer; null switches the correction off.
        kl_coef: Weight of the KL to the policy at the start of the stage.
        kl_bias_correction: Multiplies the KL term by the ratio.
        entropy_coef: Weight of the entropy, which is rewarded.
        advantage_scale: Whose standard deviation divides the advantages; null is none for dr_grpo, group for all
            others.
        mask_truncated: Leaves completions that were cut at ``max_new_tokens`` out of the loss.
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
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"loss.dual_clip must be greater than 1 (or null), got {self.dual_clip}")
        if self.importance_cap is not None and self.importance_cap <= 0:
            raise ValueError(f"loss.importance_cap must be positive (or null), got {self.importance_cap}")
        if self.cispo_clip_max <= 0:
            raise ValueError(f"loss.cispo_clip_max must be positive, got {self.cispo_clip_max}")

    @property
    def needs_reference(self) -> bool:
        """Whether the log-probabilities of the policy at the start of the stage are needed."""
        return self.kl_coef != 0

    @property
    def needs_entropy(self) -> bool:
        """Whether the entropies of the predicting distributions are needed."""
        return self.entropy_coef != 0

    @property
    def scale(self) -> AdvantageScale:
        """Whose standard deviation divides the advantages."""
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
            importance_sampling=self.importance_cap is not None,
            importance_cap=self.importance_cap,
            kl_coef=self.kl_coef,
            kl_bias_correction=self.kl_bias_correction,
            entropy_coef=self.entropy_coef,
        )
