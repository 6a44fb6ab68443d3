"""GRPO on rule rewards, DeepIntuit's second stage (arXiv 2603.10300); objective in ``functional/losses.py``.

A training step reads as the paper: generate, score, advantages, old and reference log-probs, then for each inner epoch
and minibatch the policy's log-probs, loss, backward, clip, optimizer step. ``docs/grpo.md`` has every option.

Shape letters: B prompts of a step (``batch_size``), G completions per prompt, N = B·G rows, L tokens.

Deviations from the paper:
    1. With one optimizer step per rollout batch the old log-probs are those of the same forward, without gradient.
    2. Log-probs are those under the sampling temperature, as the sampler's are.
    3. Dead groups (equal rewards) may be sampled again, ``resample`` times, or give way to groups of earlier steps,
       ``replay``; off by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable

from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_modules.base import GREEDY, Decide
from vidreason.lightning_modules.functional.aggregation import (
    LossType,
    RatioLevel,
    StepCounts,
    check_loss_type,
    loss_normalizer,
    token_normalizer,
)
from vidreason.lightning_modules.functional.losses import GRPOLoss, grpo_loss
from vidreason.lightning_modules.functional.policy_terms import largest_gap
from vidreason.lightning_modules.grpo_parts import Part, Rolled, count_step, make_parts, split_evenly
from vidreason.lightning_modules.grpo_policy import PolicyModule
from vidreason.lightning_modules.grpo_replay import ReplayBuffer
from vidreason.lightning_modules.grpo_state import RolloutStep
from vidreason.lightning_modules.grpo_statistics import RolloutTable, Stopwatch
from vidreason.lightning_modules.interrupts import stop_together, unless_stopped
from vidreason.lightning_modules.own_traces import OWN_TRACES, TraceOptions
from vidreason.lightning_modules.vlms.base import VLM, Scores
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.sharding import whole
from vidreason.rewards.accuracy import AccuracyReward
from vidreason.rewards.base import RewardFn
from vidreason.rewards.completion import THINK_FORM, CompletionForm
from vidreason.rewards.format import FormatReward

ROLLOUTS = Sampling(max_new_tokens=2048)


class GRPOModule(PolicyModule):
    """Refines a policy that reasons before it answers on the rewards of its own completions.

    Args:
        vlm: See ``VLMModule``.
        adapter_path: The policy to start from, as a rule the cold start's ``adapter/``; null starts from the base.
        rewards: Reward functions, each with its weight; null is accuracy and format, weight 1 each.
        group_size: Completions per prompt (G).
        train_sampling: How rollouts are sampled.
        loss_type: grpo, dr_grpo, dapo, bnpo, cispo or gspo: how the terms of the tokens are added up.
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
        mask_truncated: Leave completions that were cut at ``max_new_tokens`` out of the loss.
        inner_epochs: Passes over each rollout batch.
        minibatches: Optimizer steps per pass.
        prompts_per_forward: Prompts that go through the model at once; null is a whole minibatch.
        resample: How often dead groups are sampled again.
        replay: Groups of earlier steps that are kept, to be trained on instead of dead ones; 0 is off.
        balance_classes: Draw the prompts so that all classes are equally frequent.
        max_grad_norm: Gradient clipping; 0 is none.
        cold_steps: Stop after this many steps in which no completion has parsed.
        optimizer: See ``VLMModule``; so are all arguments below.
        schedule: Learning-rate schedule.
        warmup: Share or number of warm-up steps.
        decide: How ``val`` is decided.
        samples: Completions per clip for ``decide: answer``.
        sampling: Sampling for ``decide: answer``.
        predict: What ``predict`` writes.
        traces_sampled: How ``predict`` samples.
        batch_size: Clips per training batch.
        seed: Seed of all sampling.
        completion: Which blocks a completion has.
    """

    stage: ClassVar[str] = "grpo"
    weighs_clips: ClassVar[bool] = True

    def __init__(
        self,
        vlm: VLM,
        adapter_path: str | None = None,
        rewards: list[RewardFn] | None = None,
        group_size: int = 8,
        train_sampling: Sampling = ROLLOUTS,
        loss_type: LossType = "dapo",
        ratio_level: RatioLevel | None = None,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.28,
        cispo_clip_max: float = 5.0,
        dual_clip: float | None = 3.0,
        importance_cap: float | None = 2.0,
        kl_coef: float = 0.0,
        kl_bias_correction: bool = False,
        entropy_coef: float = 0.0,
        advantage_scale: Literal["group", "batch", "none"] | None = None,
        mask_truncated: bool = False,
        inner_epochs: int = 1,
        minibatches: int = 1,
        prompts_per_forward: int | None = None,
        resample: int = 0,
        replay: int = 0,
        balance_classes: bool = False,
        max_grad_norm: float = 1.0,
        cold_steps: int = 5,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
        warmup: float = 10,
        decide: Decide = "answer",
        samples: int = 1,
        sampling: Sampling = GREEDY,
        predict: Literal["describe", "reason"] = "reason",
        traces_sampled: TraceOptions = OWN_TRACES,
        batch_size: int | None = None,
        seed: int | None = None,
        completion: CompletionForm = THINK_FORM,
    ) -> None:
        super().__init__(
            vlm,
            adapter_path,
            optimizer,
            schedule,
            warmup,
            decide,
            samples,
            sampling,
            predict,
            traces_sampled=traces_sampled,
            batch_size=batch_size,
            seed=seed,
            completion=completion,
        )
        if train_sampling.temperature <= 0:
            raise ValueError(
                "train_sampling.temperature must be positive: greedy completions of a prompt are all equal"
            )
        if min(group_size, inner_epochs, minibatches) < 1:
            raise ValueError(
                f"group_size, inner_epochs and minibatches must be at least 1, got {group_size}, {inner_epochs}, "
                f"{minibatches}"
            )
        if min(resample, replay) < 0:
            raise ValueError(f"resample and replay must not be negative, got {resample} and {replay}")
        check_loss_type(loss_type)
        self.automatic_optimization = False
        self.rewards = [AccuracyReward(), FormatReward()] if rewards is None else rewards
        self.group_size = group_size
        self.train_sampling = train_sampling
        self.loss_type: LossType = loss_type
        self.ratio_level: RatioLevel | None = ratio_level
        self.clip_eps_low = clip_eps_low
        self.clip_eps_high = clip_eps_high
        self.cispo_clip_max = cispo_clip_max
        self.dual_clip = dual_clip
        self.importance_cap = importance_cap
        self.kl_coef = kl_coef
        self.kl_bias_correction = kl_bias_correction
        self.entropy_coef = entropy_coef
        self.advantage_scale = advantage_scale or ("none" if loss_type == "dr_grpo" else "group")
        self.mask_truncated = mask_truncated
        self.inner_epochs = inner_epochs
        self.minibatches = minibatches
        self.prompts_per_forward = prompts_per_forward
        self.resample = resample
        self.replay = ReplayBuffer(replay, self.seed) if replay else None
        self.balance_classes = balance_classes
        self.max_grad_norm = max_grad_norm
        self.cold_steps = cold_steps
        self.reference = None

    @property
    def updates_per_batch(self) -> int:
        """Optimizer steps per rollout batch."""
        return self.inner_epochs * self.minibatches

    # ------------------------------------------------------------------ the step

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Any:
        """One rollout batch: generate, score, advantages, log-probs, and the updates on them.

        Returns:
            ``{"groups": [B] RolloutGroup, "advantages": [B, G], "fillers": rows that count nothing}`` for callbacks.
        """
        clock = Stopwatch()
        if (step := self.unfinished_step()) is None:
            fillers = (~batch.sample_mask).nonzero().flatten().tolist()
            rolled = self.roll_out(batch, clock)
            with clock("reward"):
                groups = tuple(group for part in rolled for group in part.groups)
                table = RolloutTable.of(groups, self.data.label_names, fillers).over_ranks(self.over_ranks)
                shown = next((g for row, g in enumerate(groups) if row not in fillers), groups[0])
                self.refuse_cold_policy(table.counted(), shown.rollouts[0].completion.text)
                advantages = self.advantages(table, len(groups))
            parts = make_parts(rolled, advantages, self.mask_truncated, batch.sample_mask)
            parts = self.with_frozen_logprobs(parts, clock)
            step = RolloutStep(self.replayed(parts), parts, advantages, 0)
        with clock("update_actor"):
            self.learn(step)
        self.log_step(step, clock)
        return {"groups": step.groups, "advantages": step.advantages, "fillers": step.fillers}

    def learn(self, step: RolloutStep) -> None:
        """Makes the optimizer steps on a batch that are still to be made; the fit may be stopped between two."""
        minibatches = [m for _ in range(self.inner_epochs) for m in split_evenly(step.training_parts, self.minibatches)]
        for number, minibatch in enumerate(minibatches):
            if number < step.updates:
                continue
            if number > 0:
                self.stop_between_updates(replace(step, updates=number))
            self.update([part for place in minibatch for part in place])

    def roll_out(self, batch: VideoBatch, clock: Stopwatch) -> list[Rolled]:
        """Samples and scores a batch; ranks may write unequal lengths, and sample unequal numbers of groups again."""
        fillers = (~batch.sample_mask).nonzero().flatten().tolist()

        def sampled() -> list[Rolled]:
            with clock("gen"):
                sampled = self.generate(batch)
            with clock("reward"):
                rolled = [self.rewarded(part) for part in sampled]
            for attempt in range(1, self.resample + 1):
                with clock("gen"):
                    rolled = self.resample_dead(rolled, attempt, fillers)
            return rolled

        with ExitStack() as gathered:
            with clock("gen"):
                gathered.enter_context(whole(self.policy))
            rolled: list[Rolled] = unless_stopped(self.trainer.strategy, sampled, [])
        stop_together(self.trainer.strategy)
        return rolled

    def update(self, minibatch: Sequence[Part]) -> None:
        """One optimizer step on the completions of some parts, divided by the counts of all parts of all ranks."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        counts = StepCounts(*self.mean_over_ranks(torch.stack(count_step(minibatch))).unbind())
        self.learns_nothing = not float(counts.completions)
        optimizer.zero_grad()
        losses, gaps, minibatch = [], [], self.as_many_on_all_ranks(minibatch)
        for number, part in enumerate(minibatch, start=1):
            with self.syncing(last=number == len(minibatch)):
                scores = self.score(part, with_entropy=self.entropy_coef != 0)
                loss = self.loss(part, scores, counts)
                self.manual_backward(loss.loss)
            losses.append(GRPOLoss(*(value.detach() for value in loss)))
            old = scores.logprobs.detach() if part.old_logprobs is None else part.old_logprobs
            gaps.append(largest_gap(old, part.batch.logprobs, part.counted))
        self.log("train/grad_norm", self.clip_gradients_(self.max_grad_norm))
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
        self.log_update(losses, torch.stack(gaps).amax())
        optimizer.step()
        schedule = self.lr_schedulers()
        schedule.step()  # type: ignore[union-attr]
        self.learns_nothing = False

    def loss(self, part: Part, scores: Scores, counts: StepCounts) -> GRPOLoss:
        """The objective of one part, divided by the counts of the whole optimizer step."""
        return grpo_loss(
            scores.logprobs,
            part.advantages,
            part.counted,
            normalizer=loss_normalizer(self.loss_type, counts, self.train_sampling.max_new_tokens),
            token_count=token_normalizer(counts),
            old_logprobs=part.old_logprobs,
            rollout_logprobs=part.batch.logprobs,
            ref_logprobs=part.ref_logprobs,
            entropy=scores.entropy,
            loss_type=self.loss_type,
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
