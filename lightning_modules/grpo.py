"""GRPO on rule rewards, DeepIntuit's second stage (arXiv 2603.10300); objective in ``functional/losses.py``.

A training step reads as the paper: generate, score, advantages, old and reference log-probs, then for each inner epoch
and minibatch the policy's log-probs, loss, backward, clip, optimizer step.

Shape letters: B prompts of a step (``batch_size``), G completions per prompt, N = B·G rows, L tokens.

Deviations from the paper:
    1. With one optimizer step per rollout batch the old log-probs are those of the same forward, without gradient.
    2. Log-probs are those under the sampling temperature, as the sampler's are.
    3. Dead groups (equal rewards) may be sampled again, ``resample`` times; off by default.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from peft import PeftModel
from torch import Tensor, nn

from vidreason.datamodules.prompts import ClipView, ReasonView
from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_modules.base import GREEDY, Decide, VLMModule
from vidreason.lightning_modules.functional.advantages import dead_groups, group_relative_advantages
from vidreason.lightning_modules.functional.losses import GRPOLoss, grpo_loss
from vidreason.lightning_modules.grpo_parts import Part, split_evenly
from vidreason.lightning_modules.grpo_statistics import Stopwatch, rollout_statistics, update_statistics
from vidreason.lightning_modules.own_traces import OWN_TRACES, TraceOptions
from vidreason.lightning_modules.rollout import (
    ColdPolicyError,
    CompletionBatch,
    RolloutGroup,
    generate_rollouts,
    reward_tensor,
    score_rollouts,
    take_prompts,
)
from vidreason.lightning_modules.trained_weights import ADAPTER_FOLDER
from vidreason.lightning_modules.vlms.adapters import copy_adapter, use_adapter
from vidreason.lightning_modules.vlms.base import VLM, Scores
from vidreason.lightning_modules.vlms.building import POLICY
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.rewards.accuracy import AccuracyReward
from vidreason.rewards.base import RewardFn
from vidreason.rewards.format import FormatReward

REFERENCE = "reference"
ROLLOUTS = Sampling(max_new_tokens=2048)
_ANOTHER_SEED = 1_000_003
"""Apart from the seeds that users choose, so that a group sampled again differs from the same group of another run."""


class GRPOModule(VLMModule):
    """Refines a policy that reasons before it answers on the rewards of its own completions.

    Args:
        vlm: See ``VLMModule``.
        adapter_path: The policy to start from, as a rule the cold start's ``adapter/``; null starts from the base.
        rewards: Reward functions, each with its weight; null is accuracy and format, weight 1 each.
        group_size: Completions per prompt (G).
        train_sampling: How rollouts are sampled.
        clip_eps_low: The ratio is clipped below 1 - this.
        clip_eps_high: The ratio is clipped above 1 + this.
        dual_clip: Largest ratio that counts against a token with a negative advantage; null is unlimited.
        importance_cap: Largest weight for the gap between sampler and trainer; null switches the correction off.
        kl_coef: Weight of the KL to the policy at the start of the stage.
        entropy_coef: Weight of the entropy, which is rewarded.
        advantage_scale: Whose standard deviation divides the advantages.
        inner_epochs: Passes over each rollout batch.
        minibatches: Optimizer steps per pass.
        prompts_per_forward: Prompts that go through the model at once; null is a whole minibatch.
        resample: How often dead groups are sampled again.
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
    """

    stage: ClassVar[str] = "grpo"

    def __init__(
        self,
        vlm: VLM,
        adapter_path: str | None = None,
        rewards: list[RewardFn] | None = None,
        group_size: int = 8,
        train_sampling: Sampling = ROLLOUTS,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.28,
        dual_clip: float | None = 3.0,
        importance_cap: float | None = 2.0,
        kl_coef: float = 0.0,
        entropy_coef: float = 0.0,
        advantage_scale: Literal["group", "batch", "none"] = "group",
        inner_epochs: int = 1,
        minibatches: int = 1,
        prompts_per_forward: int | None = None,
        resample: int = 0,
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
        self.automatic_optimization = False
        self.rewards = [AccuracyReward(), FormatReward()] if rewards is None else rewards
        self.group_size = group_size
        self.train_sampling = train_sampling
        self.clip_eps_low = clip_eps_low
        self.clip_eps_high = clip_eps_high
        self.dual_clip = dual_clip
        self.importance_cap = importance_cap
        self.kl_coef = kl_coef
        self.entropy_coef = entropy_coef
        self.advantage_scale = advantage_scale
        self.inner_epochs = inner_epochs
        self.minibatches = minibatches
        self.prompts_per_forward = prompts_per_forward
        self.resample = resample
        self.max_grad_norm = max_grad_norm
        self.cold_steps = cold_steps
        self.reference: nn.Module | None = None
        self._rollout_steps = 0
        self._parsed = 0
        self._tokens = 0

    # ------------------------------------------------------------------ before training

    def configure_callbacks(self) -> list[Callback]:
        """Adds none; it is the first hook that sees the trainer, before Lightning refuses what it does in other words.

        Raises:
            ValueError: A trainer option is set that manual optimisation would ignore.
        """
        if self.trainer.gradient_clip_val:
            raise ValueError(
                "trainer.gradient_clip_val has no effect in GRPO: set model.init_args.max_grad_norm instead"
            )
        if self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "trainer.accumulate_grad_batches has no effect in GRPO: raise model.init_args.batch_size (prompts per "
                "step) and bound the memory with model.init_args.prompts_per_forward"
            )
        return []

    def setup(self, stage: str) -> None:
        """As every stage; says so where the policy starts from the base."""
        super().setup(stage)
        if stage == "fit" and self.adapter_path is None:
            self.print("grpo: no adapter_path given, the policy starts from the base")

    def train_view(self) -> ClipView:
        """The reasoning prompt, without targets."""
        return ReasonView(self.task)

    def build_model(self) -> nn.Module:
        """Builds the policy and, where the KL term is on, keeps a copy of it as it starts."""
        model = super().build_model()
        if self.kl_coef != 0:
            if isinstance(model, PeftModel):
                copy_adapter(model, POLICY, REFERENCE)
            else:
                self.reference = copy.deepcopy(model).requires_grad_(False).eval()
        return model

    @property
    def updates_per_batch(self) -> int:
        """Optimizer steps per rollout batch."""
        return self.inner_epochs * self.minibatches

    # ------------------------------------------------------------------ the step

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Any:
        """One rollout batch: generate, score, advantages, log-probs, and the updates on them.

        Returns:
            ``{"groups": [B] RolloutGroup, "advantages": [B, G]}`` for callbacks.
        """
        clock = Stopwatch()
        with clock("gen"):
            sampled = self.generate(batch)
        with clock("reward"):
            rolled = [(part, score_rollouts(part, self.rewards, self.data.label_names)) for part in sampled]
        for attempt in range(1, self.resample + 1):
            with clock("gen"):
                rolled = self.resample_dead(rolled, attempt)
        groups = tuple(group for _, scored in rolled for group in scored)
        self.refuse_cold_policy(groups)
        rewards = reward_tensor(groups)
        advantages = group_relative_advantages(rewards, scale=self.advantage_scale)
        parts = self.with_advantages(rolled, advantages)
        if self.updates_per_batch > 1:
            with clock("old_log_prob"):
                parts = [replace(part, old_logprobs=self.frozen_logprobs(part, None)) for part in parts]
        if self.kl_coef != 0:
            with clock("ref"):
                parts = [replace(part, ref_logprobs=self.frozen_logprobs(part, REFERENCE)) for part in parts]
        with clock("update_actor"):
            for _ in range(self.inner_epochs):
                for minibatch in split_evenly(parts, self.minibatches):
                    self.update(minibatch)
        self._tokens += sum(r.completion.n_tokens for group in groups for r in group.rollouts)
        self.log_dict({**rollout_statistics(groups, rewards), **clock.logged()}, batch_size=len(batch))
        self.log("train/num_tokens", float(self._tokens), batch_size=len(batch))
        self.log("reward", rewards.mean().float(), prog_bar=True, logger=False, batch_size=len(batch))
        return {"groups": groups, "advantages": advantages}

    def generate(self, batch: VideoBatch) -> list[CompletionBatch]:
        """Samples G completions for every prompt, as many prompts at once as go through the model at once."""
        assert batch.prompts is not None
        size = max(1, len(batch) // self.minibatches)
        size = min(size, self.prompts_per_forward or size)
        parts = []
        for start in range(0, len(batch), size):
            index = torch.arange(start, min(start + size, len(batch)), device=self.device)
            clips = batch.clips[start : start + size]
            prompts = take_prompts(self.vlm, batch.prompts, index) if size < len(batch) else batch.prompts
            parts.append(
                generate_rollouts(
                    self.vlm,
                    self.policy,
                    prompts,
                    clips,
                    self.group_size,
                    self.train_sampling,
                    self.seed,
                    self.global_step,
                )
            )
        return parts

    def resample_dead(
        self, rolled: list[tuple[CompletionBatch, tuple[RolloutGroup, ...]]], attempt: int = 1
    ) -> list[tuple[CompletionBatch, tuple[RolloutGroup, ...]]]:
        """Samples the groups with equal rewards again, with other noise; the others stay as they are."""
        fresh: list[tuple[CompletionBatch, tuple[RolloutGroup, ...]]] = []
        for batch, groups in rolled:
            dead = dead_groups(reward_tensor(groups)).tolist()
            alive_rows = [b for b, is_dead in enumerate(dead) if not is_dead]
            dead_rows = [b for b, is_dead in enumerate(dead) if is_dead]
            if alive_rows:
                fresh.append((batch.take(self.vlm, alive_rows), tuple(groups[b] for b in alive_rows)))
            if dead_rows:
                old = batch.take(self.vlm, dead_rows)
                seed = self.seed + _ANOTHER_SEED * attempt
                again = generate_rollouts(
                    self.vlm,
                    self.policy,
                    old.prompts,
                    old.clips,
                    self.group_size,
                    self.train_sampling,
                    seed,
                    self.global_step,
                )
                fresh.append((again, score_rollouts(again, self.rewards, self.data.label_names)))
        return fresh

    def with_advantages(
        self, rolled: Sequence[tuple[CompletionBatch, tuple[RolloutGroup, ...]]], advantages: Tensor
    ) -> list[Part]:
        """Hands every part its rows of the advantages [B, G]."""
        parts, start = [], 0
        for batch, groups in rolled:
            rows = advantages[start : start + len(groups)].flatten().float().to(self.device)
            parts.append(Part(batch, groups, rows))
            start += len(groups)
        return parts

    def update(self, minibatch: Sequence[Part]) -> None:
        """One optimizer step on the completions of some parts; the loss is a mean over all their tokens."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        count = sum((part.batch.texts.loss_mask.sum() for part in minibatch), torch.zeros((), device=self.device))
        count = self.trainer.strategy.reduce(count.float(), reduce_op="mean")
        optimizer.zero_grad()
        losses = []
        for part in minibatch:
            loss = self.loss(part, count)
            self.manual_backward(loss.loss)
            losses.append(GRPOLoss(*(value.detach() for value in loss)))
        self.log("train/grad_norm", self.clip_gradients_(self.max_grad_norm))
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
        self.log_dict(update_statistics(losses))
        optimizer.step()
        schedule = self.lr_schedulers()
        schedule.step()  # type: ignore[union-attr]

    def loss(self, part: Part, token_count: Tensor) -> GRPOLoss:
        """The objective of one part, divided by the tokens of the whole optimizer step."""
        scores = self.score(part, with_entropy=self.entropy_coef != 0)
        return grpo_loss(
            scores.logprobs,
            part.advantages,
            part.batch.texts.loss_mask,
            normalizer=token_count,
            old_logprobs=part.old_logprobs,
            rollout_logprobs=None if self.importance_cap is None else part.batch.logprobs,
            ref_logprobs=part.ref_logprobs,
            entropy=scores.entropy,
            clip_eps_low=self.clip_eps_low,
            clip_eps_high=self.clip_eps_high,
            dual_clip=self.dual_clip,
            importance_cap=self.importance_cap,
            kl_coef=self.kl_coef,
            entropy_coef=self.entropy_coef,
        )

    def score(self, part: Part, with_entropy: bool = False, model: nn.Module | None = None) -> Scores:
        """Log-probs of the sampled tokens under the sampling temperature."""
        batch = part.batch
        temperature = self.train_sampling.temperature
        return self.vlm.score(model or self.policy, batch.prompts, batch.texts, temperature, with_entropy)

    def frozen_logprobs(self, part: Part, adapter: str | None) -> Tensor:
        """Log-probs [n, L] without gradient, of the policy as it is (None) or of the reference."""
        is_lora = isinstance(self.policy, PeftModel)
        switch: AbstractContextManager[None] = (
            use_adapter(self.policy, adapter) if adapter is not None and is_lora else nullcontext()
        )
        with torch.no_grad(), switch:
            return self.score(part, model=self.reference if adapter is not None else None).logprobs

    def refuse_cold_policy(self, groups: Sequence[RolloutGroup]) -> None:
        """Stops the stage where nothing that the policy writes can be rewarded for its answer.

        Raises:
            ColdPolicyError: After ``cold_steps`` steps in which no completion has parsed.
        """
        self._rollout_steps += 1
        self._parsed += sum(r.completion.parsed.answer is not None for group in groups for r in group.rollouts)
        if self._parsed == 0 and self._rollout_steps >= self.cold_steps:
            example = groups[0].rollouts[0].completion.text
            raise ColdPolicyError(
                f"none of the completions of the first {self._rollout_steps} steps has an <answer> block (the last one "
                f"begins {example[:60]!r}), so no reward can teach this policy. Run the cold start first:\n"
                "  vidreason fit --config configs/sft_cold_start.yaml --run_dir runs/cold_start\n"
                "and hand its weights over:\n"
                "  vidreason fit --config configs/grpo.yaml --model.init_args.adapter_path "
                f"runs/cold_start/{ADAPTER_FOLDER}"
            )
