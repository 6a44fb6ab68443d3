"""Intuitive calibration, DeepIntuit's last stage (arXiv 2603.10300): a reviewer that reads the policy's traces.

The policy samples K traces per clip, which are all kept, right or wrong. A second adapter on the same base, the
*calibrator*, learns the label from video and trace; at test, its probabilities are averaged over K traces and then
temperature-scaled.

Deviations from the paper:
    1. One base in memory has two adapters; the calibrator starts as a copy of the policy's adapter (after full
       fine-tuning: as a new adapter on the policy's weights).
    2. Test uses K traces, sampled as in training, and a temperature for the probabilities fitted on ``cal``.

Shape letters: B clips, K traces per clip, C classes, N texts, L tokens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.prompts import ClipView, ReviewInput, ReviewView
from vidreason.datamodules.task import Task
from vidreason.datamodules.traces import TraceRecord
from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.decisions.closed_set import closed_set
from vidreason.lightning_modules.decisions.deciders import DecideOptions, ReviewDecider
from vidreason.lightning_modules.decisions.temperature import TemperatureScaling
from vidreason.lightning_modules.fit.passes import (
    EVAL_CLIPS,
    Pass,
    Workload,
    eval_clips,
    stand_in_texts,
    update_pass,
    writing_pass,
)
from vidreason.lightning_modules.fit.ranks import mean_over_ranks
from vidreason.lightning_modules.functional.losses import weighted_text_loss
from vidreason.lightning_modules.functional.reductions import count_or_one, label_log_probabilities
from vidreason.lightning_modules.traces.generation import TraceGenerator, TraceOptions
from vidreason.lightning_modules.traces.policy_traces import cross_fitted_traces, policy_traces
from vidreason.lightning_modules.traces.run_texts import write_run_traces
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.pieces import split_clips
from vidreason.lightning_modules.weights.lineage import Lineage
from vidreason.lightning_modules.weights.reviewer import (
    CALIBRATOR,
    ReviewerPair,
    export_reviewer,
    policy_reference,
)
from vidreason.lightning_modules.weights.reviewer_info import CalibratorInfo, calibrator_entries
from vidreason.rewards.completion import THINK_FORM
from vidreason.run_folder import ADAPTER_FOLDER


class CalibrationModule(VLMModule):
    """Trains and runs the calibrator.

    Args:
        vlm: The model family and checkpoint (the top-level ``vlm`` section).
        calibrator_path: The ``adapter/`` of a calibrator to test or to continue training. It contains the path of its
            policy, so that ``adapter_path`` may be null.
        traces_file: Trace file of the policy; missing traces (all, if null) are sampled to the run folder.
        fold_traces: Trace files that replace the policy's traces of train, each written about a fold of train by a
            policy that has not trained on it (cross-fitting).
        input: What the calibrator reads. With ``video+trace``, an account and its conclusion in the prompt; with
            ``video+reasoning``, the reasoning as its own, which it ends with its own answer, so that it starts from
            what the policy would answer. ``trace`` (a black video) and ``video`` (no trace) are ablations.
        objective: ``tokens`` is the cross-entropy of the tokens of the true label; ``classes`` that of the softmax over
            the sequence likelihoods of all labels.
        lora: Options of the calibrator's adapter if the policy has none (full fine-tuning).
        traces: Sampling options of the policy's traces, in training and at test.
    """

    stage: ClassVar[str] = "calibration"
    supports_masked_samples: ClassVar[bool] = True
    trained_adapter: ClassVar[str] = CALIBRATOR
    scales_probabilities: ClassVar[bool] = True

    def __init__(
        self,
        vlm: VLM,
        calibrator_path: str | None = None,
        traces_file: str | None = None,
        fold_traces: list[str] | None = None,
        input: ReviewInput = "video+trace",
        objective: Literal["tokens", "classes"] = "tokens",
        lora: LoRAOptions = LoRAOptions(),
        traces: TraceOptions = TraceOptions(kind="reason"),
        **kwargs: Any,
    ) -> None:
        super().__init__(vlm, traces=traces, decide=DecideOptions(), **kwargs)
        self.automatic_optimization = False
        if input == "video+reasoning" and self.completion != THINK_FORM:
            raise ValueError(
                f"model.init_args.input: video+reasoning goes on from <think>…</think>, but completion is "
                f"{self.completion}; set input to video+trace"
            )
        self.calibrator_path = calibrator_path
        self.traces_file = traces_file
        self.fold_traces = fold_traces or []
        self.input = input
        self.objective = objective
        self.reviewer = ReviewerPair(vlm, lora)
        self.adapter_options = self.reviewer.adapter_options
        self.scaling = TemperatureScaling()
        self._policy_traces: dict[str, tuple[TraceRecord, ...]] = {}

    # ------------------------------------------------------------------ policy and calibrator

    def setup(self, stage: str) -> None:
        """Connects the data module.

        Raises:
            ValueError: If there is no calibrator to test.
        """
        if self.calibrator_path is None and stage in ("test", "validate"):
            raise ValueError(
                "calibration: give --model.init_args.calibrator_path, the adapter/ that a calibration stage wrote"
            )
        super().setup(stage)

    def read_artefacts(self, task: Task) -> None:
        """Reads the path of the policy and the temperature from the calibrator's folder.

        Raises:
            ValueError: If the folder is not a calibrator, or belongs to another policy, input or class list.
        """
        if self.calibrator_path is None:
            return
        folder = Path(self.calibrator_path)
        found = CalibratorInfo.read(folder, self.stage_name)
        found.check(folder, self.input, task.label_names, task.sha())
        if self.adapter_path is None and found.policy is not None:
            self.adapter_path = os.path.normpath(folder.resolve() / found.policy)
        if self.start.sha != found.parent_sha:
            raise ValueError(
                f"calibrator_path: {folder} reviews the traces of another policy than {self.adapter_path}; "
                "leave adapter_path null to take its own"
            )
        if found.sampling != asdict(self.traces.sampling):
            rank_zero_warn(f"traces are sampled otherwise than those that {folder} was trained on: {found.sampling}")
        self.scaling.temperature = found.temperature

    def build_model(self) -> nn.Module:
        """Builds the policy and attaches the calibrator, which is active except while the policy samples."""
        return self.reviewer.attach(super().build_model(), self.calibrator_path)

    def trace_generator(self, task: Task, kind: Literal["describe", "reason"] | None = None) -> TraceGenerator:
        """Returns a generator that activates the policy instead of the calibrator."""
        return replace(super().trace_generator(task, kind), adapter_context=self.reviewer.policy_active)

    # ------------------------------------------------------------------ traces and views

    def decider(self, task: Task) -> ReviewDecider:
        """Returns the reviewer of the policy's traces."""
        return ReviewDecider(task, self.input, self.scaling.temperature, self._policy_traces)

    def train_view(self, task: Task) -> ClipView:
        """Returns the view with the true label (objective ``tokens``) or all labels behind each trace."""
        return self.decider(task).review("target" if self.objective == "tokens" else "all")

    def workload(self, data: VideoDataModule, command: str) -> Workload:
        """Returns the passes of a command, with the policy's traces as long as they may be."""
        if command == "predict":
            return super().workload(data, command)
        fits, task, options = command == "fit", data.task, self.traces
        decided = data.test_split_names if command == "test" else ("val",)
        splits = [split for split in (("train", "val", "cal") if fits else decided) if data.clips(split)]
        clips = [clip for split in splits for clip in data.clips(split)]
        texts = stand_in_texts(self.vlm.tokenizer, clips, options.sampling.max_new_tokens, options.samples)
        trained: Literal["target", "all"] = "target" if self.objective == "tokens" else "all"
        view, unknown = ReviewView(task, texts, trained, self.input), self.input != "video"
        writing = [writing_pass(self, data, "reason", splits)] if unknown and self.traces_file is None else []
        training = [update_pass(self, data, view, stand_ins=unknown)] if fits else []
        scored = Pass(
            "deciding",
            "score",
            tuple(splits),
            ReviewView(task, texts, "all", self.input),
            EVAL_CLIPS,
            eval_clips(self, data),
            stand_ins=unknown,
        )
        names = {"cal": "temperature", "val": "validation"}
        scoring = [replace(scored, name=names[s], splits=(s,)) for s in splits if s in names] if fits else [scored]
        return Workload((*writing, *training, *scoring), frozen_copies=int(self.vlm.lora is not None))

    def prepare_views(self) -> None:
        """Collects the policy's traces of all splits of this run and connects the views."""
        data, task = self.data, self.data.task
        splits = {
            TrainerFn.FITTING: [split for split in ("train", "val", "cal") if data.clips(split)],
            TrainerFn.VALIDATING: ["val"],
            TrainerFn.TESTING: list(data.test_split_names),
        }[TrainerFn(self.trainer.state.fn)]
        if self.input != "video":
            self._policy_traces = self.collect_traces(splits)
        data.connect(train_view=self.train_view(task), eval_view=self.decider(task).view)

    def collect_traces(self, splits: Sequence[str]) -> dict[str, tuple[TraceRecord, ...]]:
        """Returns the traces by video id; traces that are missing in the trace file are sampled.

        Raises:
            ValueError: If the file belongs to another policy, task, prompt or sampling.
        """
        generator, samples = self.trace_generator(self.data.task, "reason"), self.traces.samples
        found = policy_traces(self.traces_file, generator.header, samples)
        if self.fold_traces and "train" in splits:
            splits = [split for split in splits if split != "train"]  # The policy knows these clips and writes none.
            train = {clip.video_id for clip in self.data.clips("train")}
            found = cross_fitted_traces(found, self.fold_traces, generator.header, samples, train)
        lacking = [s for s in splits if any(clip.video_id not in found for clip in self.data.clips(s))]
        if not lacking:
            return found
        writer = self.adapter_path or "the base"
        self.print(f"calibration: {writer} writes {samples} traces per clip of {', '.join(lacking)}")
        store = write_run_traces(self.trainer, self.policy, generator, self.data, lacking, found)
        return {**store.by_video(kept_only=False), **found}

    # ------------------------------------------------------------------ training

    def training_step(self, batch: VideoBatch, batch_idx: int) -> None:
        """Runs one optimizer step on the cross-entropy of the label behind video and trace."""
        texts, names = batch.valid_texts, len(self.data.label_names)
        # The divisor of the loss: tokens of the true labels, or closed-set questions.
        own = texts.loss_mask.sum() if self.objective == "tokens" else texts.loss_mask.any(dim=1).sum() // names
        count = mean_over_ranks(self.trainer, own)
        losses: list[Tensor] = []

        def loss(part: VideoBatch) -> Tensor:
            logprobs = self.vlm.score(self.policy, part.prompts, part.texts).logprobs
            losses.append(self.review_loss(logprobs, part, count))
            return losses[-1]

        micro_batches = split_clips(self.vlm, batch, self.updates.clips_per_forward)
        has_samples = bool(count)
        step = self.optimizer_step_on(micro_batches, loss, has_samples)
        if has_samples:
            total = mean_over_ranks(self.trainer, torch.stack(losses).sum().detach())
            self.log("train/loss", total, prog_bar=True, batch_size=len(batch))
            self.log_dict({"train/grad_norm": step.grad_norm, "train/learning_rate": step.learning_rate})

    def review_loss(self, logprobs: Tensor, batch: VideoBatch, count: Tensor) -> Tensor:
        """Returns the summed cross-entropy of a micro-batch, divided by the count of the whole optimizer step."""
        texts = batch.valid_texts
        if self.objective == "tokens":
            return weighted_text_loss(
                logprobs,
                texts.loss_mask,
                torch.zeros_like(texts.answer_mask),
                answer_weight=None,
                reasoning_count=count,
                answer_count=0,
            ).loss
        asked = closed_set(logprobs, texts, len(self.data.label_names))
        truth = batch.labels[asked.owner]
        return -label_log_probabilities(asked.scores).gather(1, truth[:, None]).sum() / count_or_one(count)

    # ------------------------------------------------------------------ temperature

    def on_validation_epoch_start(self) -> None:
        """Fits the temperature to the current weights, so that validation uses it."""
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.fit_temperature()

    def fit_temperature(self) -> None:
        """Fits the temperature on split ``cal``, which has no other use."""
        data = self.data
        if not data.clips("cal"):
            rank_zero_warn("calibration: there is no split cal, so the temperature stays 1")
            return
        batches = data.loader("cal", self.decider(data.task).view)
        with self.trainer.precision_plugin.forward_context():
            size, step = self.evaluation.clips_per_forward, self.trainer.global_step
            self.scaling.fit(self.vlm, self.policy, batches, data.label_names, step, size)

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of ``val`` and the temperature."""
        super().on_validation_epoch_end()
        self.log("val/temperature", self.scaling.temperature)

    def on_test_epoch_end(self) -> None:
        """Logs the metrics and the temperature of every test split."""
        super().on_test_epoch_end()
        self.log_dict({f"{split}/temperature": self.scaling.temperature for split in self.data.test_split_names})

    def stateful(self) -> Mapping[str, Stateful]:
        """Returns the temperature scaling, which checkpoints store."""
        return {"temperature": self.scaling}

    # ------------------------------------------------------------------ artefacts

    def lineage(self, folder: Path) -> Lineage:
        """Returns the origin of the calibrator, with the entries that are needed to run it."""
        policy = policy_reference(self.start, folder, Path(self.trainer.default_root_dir))
        extra = calibrator_entries(self.scaling.temperature, self.input, self.objective, policy, self.traces)
        found = super().lineage(folder)
        return replace(found, extra={**found.extra, **extra})

    def export(self, run_dir: Path) -> Path:
        """Writes the calibrator, with a copy of its policy's adapter inside, to ``run_dir/adapter``."""
        stale = self.scaling.fitted_at != self.trainer.global_step
        if stale and self.trainer.state.status != TrainerStatus.INTERRUPTED:  # An interrupted fit has to end quickly.
            self.fit_temperature()
        return export_reviewer(self.policy, self.start, run_dir, self.lineage(run_dir / ADAPTER_FOLDER).info())
