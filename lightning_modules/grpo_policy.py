"""The policy under GRPO, up to its update: what it starts from, what it samples, its log-probs, what is logged.

Shape letters: B prompts of a step, G completions per prompt, n completions of a part, L tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Literal

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ParallelStrategy
from peft import PeftModel
from torch import Tensor, nn

from vidreason.datamodules.prompts import ClipView, RewardedView
from vidreason.datamodules.types import Clip, EncodedPrompts, VideoBatch
from vidreason.lightning_modules.functional.advantages import dead_groups, group_relative_advantages
from vidreason.lightning_modules.functional.losses import GRPOLoss
from vidreason.lightning_modules.grpo_parts import Part, Rolled
from vidreason.lightning_modules.grpo_resuming import REFERENCE, ResumablePolicy
from vidreason.lightning_modules.grpo_state import RolloutStep
from vidreason.lightning_modules.grpo_statistics import (
    RolloutTable,
    Stopwatch,
    prefix_statistics,
    rollout_statistics,
    update_statistics,
)
from vidreason.lightning_modules.rollout import (
    ColdPolicyError,
    CompletionBatch,
    generate_rollouts,
    reward_tensor,
    score_rollouts,
    take_prompts,
    warn_of_failures,
)
from vidreason.lightning_modules.vlms.base import Scores
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import copy_adapter, use_adapter
from vidreason.lightning_modules.vlms.loading.building import POLICY
from vidreason.lightning_modules.vlms.prefix.layout import is_sharded
from vidreason.lightning_modules.vlms.text.context import prompt_tokens
from vidreason.lightning_modules.work import Work
from vidreason.rewards.base import RewardFn
from vidreason.run_folder import ADAPTER_FOLDER

_ANOTHER_SEED = 1_000_003
"""Apart from the seeds that users choose, so that a group sampled again differs from the same group of another run."""


class PolicyModule(ResumablePolicy):
    """A policy that is rewarded for what it samples; a subclass has the arguments and the step.

    Its attributes are arguments of ``GRPOModule``.
    """

    rewards: list[RewardFn]
    group_size: int
    train_sampling: Sampling
    minibatches: int
    inner_epochs: int
    prompts_per_forward: int | None
    advantage_scale: Literal["group", "batch", "none"]
    kl_coef: float
    cold_steps: int
    balance_classes: bool
    reference: nn.Module | None
    _named: frozenset[str] = frozenset()

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
        self.data.connect(balance_classes=self.balance_classes)
        if stage == "fit" and self.adapter_path is None:
            self.print("grpo: no adapter_path given, the policy starts from the base")

    def train_view(self) -> ClipView:
        """The reasoning prompt, without targets, of the clips that have a label."""
        return RewardedView(self.task, form=self.completion)

    def build_model(self) -> nn.Module:
        """Builds the policy and, where the KL term is on, keeps a copy of it as it starts."""
        model = super().build_model()
        if self.kl_coef != 0:
            if isinstance(model, PeftModel):
                copy_adapter(model, POLICY, REFERENCE)
            else:
                self.reference = copy.deepcopy(model).requires_grad_(False).eval()
        return model

    def weights(self) -> Sequence[nn.Module]:
        """Returns the policy, and the reference after full fine-tuning."""
        return [self.policy] if self.reference is None else [self.policy, self.reference]

    # ------------------------------------------------------------------ rollouts

    def generate(self, batch: VideoBatch) -> list[CompletionBatch]:
        """Samples G completions for every prompt, as many prompts at once as go through the model at once."""
        size = max(1, len(batch) // self.minibatches)
        size = min(size, self.prompts_per_forward or size)
        parts = []
        for start in range(0, len(batch), size):
            index = torch.arange(start, min(start + size, len(batch)), device=self.device)
            clips = batch.clips[start : start + size]
            prompts = take_prompts(self.vlm, batch.prompts, index) if size < len(batch) else batch.prompts
            parts.append(self.sample_groups(prompts, clips, self.seed))
        return parts

    def sample_groups(self, prompts: EncodedPrompts, clips: Sequence[Clip], seed: int) -> CompletionBatch:
        """Samples G completions for each of some prompts."""
        return generate_rollouts(
            self.vlm,
            self.policy,
            prompts,
            clips,
            self.group_size,
            self.train_sampling,
            seed,
            self.global_step,
            self.completion,
        )

    def rewarded(self, batch: CompletionBatch) -> Rolled:
        """Scores completions; says once of every reward that it could not be told."""
        groups = score_rollouts(batch, self.rewards, self.data.label_names)
        self._named |= warn_of_failures(groups, self._named)
        return Rolled(batch, groups)

    def resample_dead(self, rolled: Sequence[Rolled], attempt: int = 1, fillers: Collection[int] = ()) -> list[Rolled]:
        """Samples the groups with equal rewards again, with other noise; others, and ``fillers``, stay as they are."""
        fresh: list[Rolled] = []
        for part in rolled:
            start = sum(len(earlier.groups) for earlier in fresh)
            dead = dead_groups(reward_tensor(part.groups)).nonzero().flatten().tolist()
            dead = [row for row in dead if start + row not in fillers]
            if not dead:
                fresh.append(part)
                continue
            old = part.batch.take(self.vlm, dead)
            again = self.rewarded(self.sample_groups(old.prompts, old.clips, self.seed + _ANOTHER_SEED * attempt))
            groups = list(part.groups)
            for row, group in zip(dead, again.groups, strict=True):
                groups[row] = group
            fresh.append(Rolled(part.batch.with_groups(dead, again.batch), tuple(groups)))
        return fresh

    def advantages(self, table: RolloutTable, own: int) -> Tensor:
        """Returns the advantages [B, G] of this rank's ``own`` groups; ``batch`` scales by the rewards of all ranks."""
        rewards = table.fact("reward").masked_fill(table.fact("counted") == 0, torch.nan)
        everyone = group_relative_advantages(rewards, scale=self.advantage_scale)
        return everyone[self.global_rank * own :][:own]

    def refuse_cold_policy(self, table: RolloutTable, example: str) -> None:
        """Stops the stage where nothing that the policy writes can be rewarded for its answer.

        Args:
            table: What all ranks sampled in this step.
            example: One of the completions.

        Raises:
            ColdPolicyError: After ``cold_steps`` steps in which no completion has parsed.
        """
        self._rollout_steps += bool(len(table.values))
        self._parsed += int(table.fact("parsed").sum())
        if self._parsed == 0 and self._rollout_steps >= self.cold_steps:
            raise ColdPolicyError(
                f"none of the completions of the first {self._rollout_steps} steps names a class in an <answer> "
                f"block (the last one begins {example[:60]!r}), so no reward can teach this policy. Run the cold start "
                "first:\n"
                "  vidreason fit --config configs/sft_cold_start.yaml --run_dir runs/cold_start\n"
                "and hand its weights over:\n"
                "  vidreason fit --config configs/grpo.yaml --model.init_args.adapter_path "
                f"runs/cold_start/{ADAPTER_FOLDER}"
            )

    def replayed(self, parts: Sequence[Part]) -> list[list[Part]]:
        """Returns every part with what takes the place of its dead groups."""
        if self.replay is None:
            return [[part] for part in parts]
        return [self.replay.refresh(part, self.vlm, self.global_step, i) for i, part in enumerate(parts)]

    # ------------------------------------------------------------------ log-probs

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

    def with_frozen_logprobs(self, parts: Sequence[Part], clock: Stopwatch) -> list[Part]:
        """Returns the parts with what the policy that sampled them, and the reference, say of their tokens."""
        parts = list(parts)
        if self.updates_per_batch > 1 or self.replay is not None:
            with clock("old_log_prob"):
                parts = [replace(part, old_logprobs=self.frozen_logprobs(part, None)) for part in parts]
        if self.kl_coef != 0:
            with clock("ref"):
                parts = [replace(part, ref_logprobs=self.frozen_logprobs(part, REFERENCE)) for part in parts]
        return parts

    def shares_prefix(self) -> bool:
        """Whether a forward encodes each prompt once."""
        return self.vlm.route != "naive"

    # ------------------------------------------------------------------ ranks

    def over_ranks(self, values: Tensor) -> Tensor:
        """Returns the rows [B, ...] of all ranks, rank after rank, on the CPU; every rank has as many."""
        if not isinstance(self.trainer.strategy, ParallelStrategy):
            return values
        gathered = self.all_gather(values.to(self.device))
        assert isinstance(gathered, Tensor)
        return gathered.reshape(-1, *values.shape[1:]).cpu()

    def as_many_on_all_ranks(self, parts: Sequence[Part]) -> Sequence[Part]:
        """Returns the parts, with others of no weight behind them where weights are sharded: no rank gathers alone.

        Replayed groups make the numbers differ.
        """
        if not is_sharded(self.policy):
            return parts
        most = int(self.over_ranks(torch.tensor([len(parts)])).max())
        return [*parts, *(parts[-1].without_weight() for _ in range(most - len(parts)))]

    def syncing(self, last: bool) -> AbstractContextManager[object]:
        """The context of one of a step's backward passes: ranks exchange gradients in the last one only.

        So ranks may go through their prompts in different numbers of parts.
        """
        strategy = self.trainer.strategy
        if last or not isinstance(strategy, ParallelStrategy):
            return nullcontext()
        context: AbstractContextManager[object] = strategy.block_backward_sync()
        return context

    # ------------------------------------------------------------------ what it logs

    def log_update(self, losses: Sequence[GRPOLoss], gap: Tensor) -> None:
        """Logs one optimizer step; sums are divided by the ranks' mean counts, so their mean is that of all tokens."""
        values = update_statistics(losses)
        reduce = self.trainer.strategy.reduce
        means = reduce(torch.stack(list(values.values())), reduce_op="mean")
        self.log_dict(dict(zip(values, means.unbind(), strict=True)))
        self.log("rollout_mismatch/max", reduce(gap, reduce_op="max"))

    def log_step(self, step: RolloutStep, clock: Stopwatch) -> None:
        """Logs what was sampled by all ranks, and where the time of this one went."""
        own = RolloutTable.of(step.groups, self.data.label_names, step.fillers)
        counted = (own if step.shared else own.over_ranks(self.over_ranks)).counted()
        size = len(step.groups)
        self._tokens += int(counted.fact("length").sum())
        prompts = torch.cat([prompt_tokens(part.batch.prompts) for part in step.sampled])
        prefix = prefix_statistics(prompts, int(own.fact("length").sum()), self.group_size, self.shares_prefix())
        self.log_dict({**prefix, **clock.logged(), "train/num_tokens": float(self._tokens)}, batch_size=size)
        if len(counted.values):
            self.log_dict(rollout_statistics(counted), batch_size=size)
            self.log("reward", counted.fact("reward").nanmean().float(), prog_bar=True, logger=False, batch_size=size)
        if self.replay is not None:
            self.log("train/replayed_groups", float(step.replayed_groups))

    def learning_work(self, clips: float, classes: int) -> Work:
        """A group behind each clip: written, scored by what stays as it is, learnt from."""
        texts = clips * self.group_size
        frozen = (self.updates_per_batch > 1) + (self.kl_coef != 0)  # log-probs of the old policy, of the reference
        return Work(clips * (1 + frozen), clips * self.inner_epochs, texts * frozen, texts * self.inner_epochs, texts)
