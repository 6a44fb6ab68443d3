"""GRPO on rule rewards, DeepIntuit's second stage (arXiv 2603.10300).

A training step samples rollouts, gathers their rewards over ranks, computes advantages, splits the rollouts into
micro-batches, scores them with the old and the reference policy, and runs an optimizer step on each minibatch.
``docs/grpo.md`` describes every option.

Shape letters: B prompts of a step (``batch_size``), G completions per prompt, N = B·G rows, L tokens.

Deviations from the paper:
    1. With one optimizer step per rollout batch, the old log-probs are those of the same forward, without gradient.
    2. Log-probs are computed at the sampling temperature, like those of the sampler.
    3. Groups with equal rewards may be sampled again, ``rollouts.resample`` times; off by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.prompts import ClipView, RewardedView
from vidreason.datamodules.task import Task
from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.decisions.deciders import DecideOptions
from vidreason.lightning_modules.fit.optimizer_step import UpdateOptions
from vidreason.lightning_modules.fit.passes import Workload, plain_workload, stand_in_texts, update_pass
from vidreason.lightning_modules.fit.ranks import all_gather_rows, mean_over_ranks
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.fit.stopping import raise_if_any_rank_stopped, run_unless_stopped
from vidreason.lightning_modules.functional.advantages import group_relative_advantages
from vidreason.lightning_modules.functional.aggregation import StepCounts
from vidreason.lightning_modules.functional.losses import PolicyLossOutput
from vidreason.lightning_modules.functional.policy_terms import largest_gap
from vidreason.lightning_modules.rl.metrics import (
    RolloutCounters,
    RolloutTable,
    Stopwatch,
    prefix_statistics,
    rollout_statistics,
    update_statistics,
)
from vidreason.lightning_modules.rl.microbatch import (
    MicroBatch,
    ScoredRollouts,
    count_step,
    make_micro_batches,
    split_evenly,
)
from vidreason.lightning_modules.rl.objective import LossInputs, PolicyLoss
from vidreason.lightning_modules.rl.reference import (
    REFERENCE,
    add_reference,
    policy_logprobs,
    reference_logprobs,
    score_rollouts,
)
from vidreason.lightning_modules.rl.rollouts import RolloutOutput
from vidreason.lightning_modules.rl.sampler import RolloutOptions, RolloutSampler
from vidreason.lightning_modules.traces.generation import TraceOptions
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.sharding import unsharded
from vidreason.lightning_modules.vlms.text.context import prompt_tokens
from vidreason.rewards.accuracy import AccuracyReward
from vidreason.rewards.base import RewardFn
from vidreason.rewards.format import FormatReward


@dataclass(frozen=True)
class PolicyUpdateOptions(UpdateOptions):
    """Options of the optimizer steps on a rollout batch.

    Args:
        clips_per_forward: Prompts per micro-batch, each with all its completions; null is a whole minibatch. It limits
            memory and, except for loss type bnpo, changes neither loss nor gradient.
        max_grad_norm: Norm to which larger gradients are scaled down; 0 disables clipping.
        inner_epochs: Passes over each rollout batch.
        minibatches: Optimizer steps per pass.
    """

    inner_epochs: int = 1
    minibatches: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.inner_epochs, self.minibatches) < 1:
            raise ValueError(
                f"updates.inner_epochs and updates.minibatches must be at least 1, got {self.inner_epochs} and "
                f"{self.minibatches}"
            )

    @property
    def per_batch(self) -> int:
        """Number of optimizer steps per rollout batch."""
        return self.inner_epochs * self.minibatches

    def prompts_per_forward(self, prompts: int) -> int:
        """Returns the number of prompts per forward pass, which is at most that of a minibatch."""
        minibatch = max(1, prompts // self.minibatches)
        return min(minibatch, self.clips_per_forward or minibatch)


class GRPOModule(VLMModule):
    """Trains a policy that reasons before it answers on the rewards of its own completions.

    Args:
        vlm: The model family and checkpoint (the top-level ``vlm`` section).
        rewards: Reward functions, each with its weight; null is accuracy and format, weight 1 each.
        rollouts: Options of the rollouts.
        loss: The policy loss and its coefficients; ``class_path`` may name a subclass of ``PolicyLoss``.
        updates: Options of the optimizer steps on a rollout batch.
        optim: The optimizer and its learning rate.
        decide: Options of decisions about clips.
        traces: Options of the texts that ``vidreason predict`` writes.
    """

    stage: ClassVar[str] = "grpo"
    supports_masked_samples: ClassVar[bool] = True
    also_saved_adapter: ClassVar[str | None] = REFERENCE
    updates: PolicyUpdateOptions

    def __init__(
        self,
        vlm: VLM,
        rewards: list[RewardFn] | None = None,
        rollouts: RolloutOptions = RolloutOptions(),
        loss: PolicyLoss = PolicyLoss(),
        updates: PolicyUpdateOptions = PolicyUpdateOptions(),
        optim: OptimOptions = OptimOptions(warmup=10),
        decide: DecideOptions = DecideOptions(by="answer"),
        traces: TraceOptions = TraceOptions(kind="reason"),
        **kwargs: Any,
    ) -> None:
        super().__init__(vlm, optim=optim, updates=updates, decide=decide, traces=traces, **kwargs)
        self.automatic_optimization = False
        self.rewards = [AccuracyReward(), FormatReward()] if rewards is None else rewards
        if not any(reward.weight for reward in self.rewards):
            raise ValueError("model.init_args.rewards: every weight is 0, so that nothing can be learnt; set one")
        self.rollouts = rollouts
        self.loss = loss
        self.counters = RolloutCounters()
        self.reference: nn.Module | None = None
        self._sampler: RolloutSampler | None = None

    # ------------------------------------------------------------------ before training

    def setup(self, stage: str) -> None:
        """Connects the data module and makes the sampler."""
        super().setup(stage)
        self.data.connect(balance_classes=self.rollouts.balance_classes)
        self._sampler = RolloutSampler(
            self.vlm, self.rollouts, self.rewards, self.seed, self.completion, self.data.label_names
        )
        if stage == "fit" and self.adapter_path is None:
            self.print("grpo: no adapter_path given, the policy starts from the base")

    def train_view(self, task: Task) -> ClipView:
        """Returns the reasoning prompt without target texts, for clips with a label."""
        return RewardedView(task, form=self.completion)

    def workload(self, data: VideoDataModule, command: str) -> Workload:
        """Returns the passes of a command, with completions as long as they may be."""
        if command != "fit":
            return super().workload(data, command)
        task, options, clips = data.task, self.rollouts, data.clips("train")
        size = self.updates.prompts_per_forward(self.batch_size or data.batch_size)
        texts = stand_in_texts(self.vlm.tokenizer, clips, options.sampling.max_new_tokens, options.group_size)
        behind = RewardedView(task, texts, self.completion)
        update = replace(update_pass(self, data, behind, stand_ins=True), clips_per_forward=size)
        rollouts = replace(
            update,
            name="rollouts",
            kind="generate",
            view=self.train_view(task),
            samples=options.group_size,
            sampling=options.sampling,
            stand_ins=False,
        )
        frozen = ["old log-probs"] * (self.updates.per_batch > 1) + ["reference log-probs"] * self.loss.needs_reference
        training = [rollouts, *(replace(update, name=name, kind="score") for name in frozen), update]
        return replace(plain_workload(self, data, command, training), frozen_copies=int(self.loss.needs_reference))

    def build_model(self) -> nn.Module:
        """Builds the policy and, if the loss needs it, a frozen copy as reference."""
        model = super().build_model()
        if self.loss.needs_reference:
            self.reference = add_reference(model)
        return model

    def models(self) -> Sequence[nn.Module]:
        """Returns the policy and, with full fine-tuning, the reference model."""
        return [self.policy] if self.reference is None else [self.policy, self.reference]

    def stateful(self) -> Mapping[str, Stateful]:
        """Returns the counters of rollouts, which checkpoints store."""
        return {"rollouts": self.counters}

    # ------------------------------------------------------------------ the step

    def training_step(self, batch: VideoBatch, batch_idx: int) -> dict[str, RolloutOutput]:
        """Samples a rollout batch and runs the optimizer steps on it."""
        clock = Stopwatch()
        rollouts = self.sample(batch, clock)
        groups = tuple(group for part in rollouts for group in part.groups)
        with clock("reward"):
            own = RolloutTable.of(groups, self.data.label_names, batch.sample_mask.tolist())
            table = own.gathered(partial(all_gather_rows, self))
            self.counters.add(table.valid())
            self.counters.check_parsed(self.rollouts.max_unparsed_steps, groups[0].rollouts[0].completion.text)
            # Scale "batch" needs the rewards of all ranks; this rank's rows follow those of the ranks before it.
            everyone = group_relative_advantages(table.total_rewards(), scale=self.loss.scale)
            advantages = everyone[self.global_rank * len(groups) :][: len(groups)]
        micro_batches = make_micro_batches(rollouts, advantages, batch.sample_mask, self.loss.mask_truncated)
        micro_batches = self.with_frozen_logprobs(micro_batches, clock)
        with clock("update_actor"):
            for _ in range(self.updates.inner_epochs):
                for minibatch in split_evenly(micro_batches, self.updates.minibatches):
                    self.update(minibatch)
        self.log_rollouts(table, own, rollouts, clock)
        return {"rollouts": RolloutOutput(groups, advantages, batch.sample_mask)}

    def sample(self, batch: VideoBatch, clock: Stopwatch) -> list[ScoredRollouts]:
        """Samples and scores a batch on unsharded weights, since ranks may sample different lengths."""
        assert self._sampler is not None
        size = self.updates.prompts_per_forward(len(batch))
        work = partial(self._sampler.sample, self.policy, batch, size, self.global_step, clock)
        with unsharded(self.policy):
            rollouts: list[ScoredRollouts] = run_unless_stopped(self.trainer.strategy, work, [])
        raise_if_any_rank_stopped(self.trainer.strategy)
        return rollouts

    def with_frozen_logprobs(self, micro_batches: Sequence[MicroBatch], clock: Stopwatch) -> list[MicroBatch]:
        """Adds the log-probs of the policy before several updates, and those of the reference policy."""
        policy, temperature, found = self.policy, self.rollouts.sampling.temperature, list(micro_batches)
        if self.updates.per_batch > 1:
            with clock("old_log_prob"):
                found = [replace(m, old_logprobs=policy_logprobs(self.vlm, policy, m, temperature)) for m in found]
        if self.loss.needs_reference:
            with clock("ref"):
                reference = partial(reference_logprobs, self.vlm, policy, self.reference, temperature=temperature)
                found = [replace(m, ref_logprobs=reference(m)) for m in found]
        return found

    def update(self, minibatch: Sequence[MicroBatch]) -> None:
        """Runs one optimizer step on micro-batches, with losses divided by the counts of the step on all ranks."""
        counts = StepCounts(*mean_over_ranks(self.trainer, torch.stack(count_step(minibatch))).unbind())
        losses: list[PolicyLossOutput] = []
        gaps: list[Tensor] = []

        def loss(micro_batch: MicroBatch) -> Tensor:
            temperature, batch = self.rollouts.sampling.temperature, micro_batch.batch
            scores = score_rollouts(self.vlm, self.policy, micro_batch, temperature, self.loss.needs_entropy)
            output = self.loss(
                LossInputs(
                    logprobs=scores.logprobs,
                    advantages=micro_batch.advantages,
                    completion_mask=micro_batch.completion_mask,
                    counts=counts,
                    max_completion_length=self.rollouts.sampling.max_new_tokens,
                    rollout_logprobs=batch.logprobs,
                    old_logprobs=micro_batch.old_logprobs,
                    ref_logprobs=micro_batch.ref_logprobs,
                    entropy=scores.entropy,
                )
            )
            losses.append(PolicyLossOutput(*(value.detach() for value in output)))
            old = scores.logprobs.detach() if micro_batch.old_logprobs is None else micro_batch.old_logprobs
            gaps.append(largest_gap(old, batch.logprobs, micro_batch.completion_mask))
            return output.loss

        has_samples = bool(counts.completions)
        step = self.optimizer_step_on(minibatch, loss, has_samples)
        # The two reductions are collective operations, so that they run with or without samples.
        values = update_statistics(losses)
        reduce = self.trainer.strategy.reduce
        means = reduce(torch.stack(list(values.values())), reduce_op="mean")
        gap = reduce(torch.stack(gaps).amax(), reduce_op="max")
        if has_samples:
            self.log_dict(dict(zip(values, means.unbind(), strict=True)))
            self.log_dict({"train/grad_norm": step.grad_norm, "train/learning_rate": step.learning_rate})
        self.log("rollout_mismatch/max", gap)

    def log_rollouts(
        self, table: RolloutTable, own: RolloutTable, rollouts: Sequence[ScoredRollouts], clock: Stopwatch
    ) -> None:
        """Logs statistics of the rollouts of all ranks, and times of this rank in seconds."""
        valid, size = table.valid(), len(own.values)
        prompts = torch.cat([prompt_tokens(part.batch.prompts) for part in rollouts])
        shared = self.vlm.route != "naive"
        prefix = prefix_statistics(prompts, int(own.column("length").sum()), self.rollouts.group_size, shared)
        tokens = {"train/num_tokens": float(self.counters.tokens)}
        self.log_dict({**prefix, **clock.logged(), **tokens}, batch_size=size)
        if len(valid.values):
            self.log_dict(rollout_statistics(valid), batch_size=size)
            reward = valid.column("reward").nanmean().float()
            self.log("reward", reward, prog_bar=True, logger=False, batch_size=size)
