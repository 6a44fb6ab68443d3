"""Intuitive calibration, DeepIntuit's last stage (arXiv 2603.10300): a reviewer that reads the policy's traces.

The policy samples K traces per clip, all kept, right or wrong. A second adapter on the same base, the *calibrator*, is
shown video and trace and learns the label; at test its probabilities are averaged over K traces, then
temperature-scaled.

Deviations from the paper:
    1. One base in memory with two adapters; the calibrator starts as a copy of the policy's adapter (after full
       fine-tuning: a fresh adapter on the policy's weights).
    2. K traces at test as in training, at the same temperature, and a temperature fitted on ``cal``.

What it hands on is described in ``calibrator_info.py``.

Shape letters: B clips, K traces per clip, C classes, R = traces in a batch, N texts, L tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.prompts import ClipView, ReviewView
from vidreason.datamodules.traces import TraceRecord, TraceStore
from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_modules.base import VLMModule, metric_key
from vidreason.lightning_modules.calibrator_info import CalibratorInfo, CalibratorInput, calibrator_extra
from vidreason.lightning_modules.deciding import closed_set, decide_by_probs, update_metrics
from vidreason.lightning_modules.functional.calibration import apply_temperature, fit_temperature
from vidreason.lightning_modules.functional.losses import weighted_text_loss
from vidreason.lightning_modules.functional.reductions import (
    average_over_traces,
    count_or_one,
    label_log_probabilities,
)
from vidreason.lightning_modules.lineage import Lineage
from vidreason.lightning_modules.metrics import ClassificationMetrics
from vidreason.lightning_modules.own_traces import OWN_TRACES, TraceOptions
from vidreason.lightning_modules.predictions import Decisions, TraceText
from vidreason.lightning_modules.rollout import Completion
from vidreason.lightning_modules.trained_weights import ADAPTER_FOLDER
from vidreason.lightning_modules.vlms.adapters import (
    LoRAOptions,
    attach_lora,
    copy_adapter,
    load_adapter,
    save_adapter,
    use_adapter,
)
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.building import POLICY
from vidreason.lightning_modules.vlms.generation import evaluating
from vidreason.lightning_modules.work import Work
from vidreason.rewards.completion import THINK_FORM, CompletionForm

CALIBRATOR = "calibrator"
CALIBRATOR_LORA = LoRAOptions()


class CalibrationModule(VLMModule):
    """Trains and runs the calibrator.

    Args:
        vlm: See ``VLMModule``.
        adapter_path: The policy, as a rule GRPO's ``adapter/`` or ``weights/``.
        calibrator_path: A calibrator's ``adapter/``, to test it or to train it on; it knows its policy, so that
            ``adapter_path`` may then be null.
        traces: Trace file of the policy; clips it lacks, and all where it is null, are sampled into the run folder.
        input: What the calibrator is shown; ``trace`` and ``video`` are ablations.
        loss: ``tokens``: cross-entropy on the tokens of the true label; ``classes``: on the softmax over all labels.
        lora: Size of the calibrator's adapter where the policy has none (full fine-tuning).
        optimizer: See ``VLMModule``; so are all arguments below.
        schedule: Learning-rate schedule.
        warmup: Share or number of warm-up steps.
        predict: What ``predict`` lets the policy write.
        traces_sampled: How the policy's traces are sampled, in training and at test alike.
        batch_size: Clips per training batch.
        seed: Seed of all sampling.
        completion: Which blocks the policy's completions have.
    """

    stage: ClassVar[str] = "calibration"
    trained_adapter: ClassVar[str] = CALIBRATOR

    def __init__(
        self,
        vlm: VLM,
        adapter_path: str | None = None,
        calibrator_path: str | None = None,
        traces: str | None = None,
        input: CalibratorInput = "video+trace",
        loss: Literal["tokens", "classes"] = "tokens",
        lora: LoRAOptions = CALIBRATOR_LORA,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
        warmup: float = 0.0,
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
            predict=predict,
            traces_sampled=traces_sampled,
            batch_size=batch_size,
            seed=seed,
            completion=completion,
        )
        self.calibrator_path = calibrator_path
        self.traces = traces
        self.input = input
        self.loss_kind = loss
        self.lora = lora
        self.temperature = 1.0
        self._temperature_step = -1
        self._traces: dict[str, tuple[TraceRecord, ...]] = {}
        self.scaled_metrics = nn.ModuleDict()

    # ------------------------------------------------------------------ weights

    def setup(self, stage: str) -> None:
        """Reads what the calibrator's folder says; then as every stage."""
        if stage == "fit":
            self.refuse_accumulation()
        if self.calibrator_path is not None:
            self.take_calibrator(Path(self.calibrator_path))
        elif stage in ("test", "validate"):
            raise ValueError(
                "calibration: give --model.init_args.calibrator_path, the adapter/ that a calibration stage wrote"
            )
        super().setup(stage)
        self.scaled_metrics = nn.ModuleDict({key: self.new_metrics() for key in self.metrics})

    def take_calibrator(self, folder: Path) -> None:
        """Takes policy and temperature from the calibrator's folder.

        Raises:
            ValueError: It is no calibrator, or is of another policy, input or class list.
        """
        found = CalibratorInfo.read(folder, self.stage_name)
        found.check(folder, self.input, self.data.label_names, self.task.sha())
        if self.adapter_path is None and found.policy is not None:
            self.adapter_path = os.path.normpath(folder.resolve() / found.policy)
        if self.parent_sha != found.parent_sha:
            raise ValueError(
                f"calibrator_path: {folder} reviews the traces of another policy than {self.adapter_path}; "
                "leave adapter_path null to take its own"
            )
        if found.sampling != asdict(self.trace_options.sampling):
            rank_zero_warn(f"traces are sampled otherwise than those that {folder} was trained on: {found.sampling}")
        self.temperature = found.temperature

    def build_model(self) -> nn.Module:
        """Builds the policy and beside it the calibrator, which is active but where the policy samples."""
        model = super().build_model()
        if self.calibrator_path is not None:
            model = load_adapter(model, self.calibrator_path, CALIBRATOR)
        elif isinstance(model, PeftModel):
            copy_adapter(model, POLICY, CALIBRATOR, trainable=True)
        else:
            assert isinstance(model, PreTrainedModel)
            frozen = self.vlm.vision_modules if self.vlm.freeze_vision else ()
            model = attach_lora(model, self.lora, CALIBRATOR, frozen)
        assert isinstance(model, PeftModel)
        model.set_adapter(CALIBRATOR)  # trainable, and POLICY frozen
        return model

    @property
    def adapter_options(self) -> LoRAOptions:
        """The calibrator's."""
        return self.vlm.lora or self.lora

    @property
    def policy_adapter(self) -> str | None:
        """Name of the policy's adapter; None where its weights are the base in memory."""
        assert isinstance(self.policy, PeftModel)
        return POLICY if POLICY in self.policy.peft_config else None

    def sample_texts(self, batch: VideoBatch, options: TraceOptions) -> Sequence[Sequence[Completion]]:
        """Lets the policy, not the calibrator, write."""
        with use_adapter(self.policy, self.policy_adapter):
            return super().sample_texts(batch, options)

    # ------------------------------------------------------------------ traces and views

    def prepare_views(self) -> None:
        """Collects the policy's traces of every split that this run looks at."""
        data = self.data
        splits = {
            TrainerFn.FITTING: [split for split in ("train", "val", "cal") if data.clips(split)],
            TrainerFn.VALIDATING: ["val"],
            TrainerFn.TESTING: list(data.test_split_names),
        }[TrainerFn(self.trainer.state.fn)]
        if self.input != "video":
            self._traces = self.collect_traces(splits)
        data.set_view(self.train_view())
        data.set_eval_view(self.eval_view())

    def collect_traces(self, splits: Sequence[str]) -> dict[str, tuple[TraceRecord, ...]]:
        """Returns the traces by video id; those that the trace file lacks are sampled now.

        Raises:
            ValueError: The file is of another policy, task, prompt or sampling.
        """
        writer = self.writer(self.reason_view(), self.trace_options)
        found: dict[str, tuple[TraceRecord, ...]] = {}
        if self.traces is not None:
            store = TraceStore.open(Path(self.traces))
            store.check(writer.header, allow_external=False)
            store.check_sampling(writer.header)
            samples = self.trace_options.samples
            found = {name: group[:samples] for name, group in store.by_video(kept_only=False).items()}
            found = {name: group for name, group in found.items() if len(group) == samples}
        lacking = [s for s in splits if any(clip.video_id not in found for clip in self.data.clips(s))]
        if not lacking:
            return found
        who = self.adapter_path or "the base"
        self.print(f"calibration: {who} writes {self.trace_options.samples} traces per clip of {', '.join(lacking)}")
        return {**self.write_traces(writer, lacking, found).by_video(kept_only=False), **found}

    def review(self, labels: Literal["all", "target"]) -> ReviewView:
        """Returns what the calibrator is shown."""
        texts = {video_id: tuple(r.text for r in group) for video_id, group in self._traces.items()}
        return ReviewView(self.task, texts, labels, self.input)

    def train_view(self) -> ClipView:
        """Traces with the true label behind each, or with all labels."""
        return self.review("target" if self.loss_kind == "tokens" else "all")

    def eval_view(self) -> ClipView:
        """Traces with all labels behind each."""
        return self.review("all")

    # ------------------------------------------------------------------ training

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Tensor:
        """Cross-entropy of the label behind video and trace, a mean over the whole optimizer step."""
        assert batch.prompts is not None
        assert batch.texts is not None
        logprobs = self.vlm.score(self.policy, batch.prompts, batch.texts).logprobs
        texts = batch.weighed_texts
        if self.loss_kind == "tokens":
            count = self.mean_over_ranks(texts.loss_mask.sum())
            no_answer = torch.zeros_like(texts.answer_mask)
            loss = weighted_text_loss(
                logprobs, texts.loss_mask, no_answer, answer_weight=None, reasoning_count=count, answer_count=0
            ).loss
        else:
            asked = closed_set(logprobs, texts, len(self.data.label_names))
            truth = batch.labels[asked.owner]
            count = self.mean_over_ranks(torch.tensor(len(truth), device=truth.device))
            loss = -label_log_probabilities(asked.scores).gather(1, truth[:, None]).sum() / count_or_one(count)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        return loss

    # ------------------------------------------------------------------ deciding

    def class_logprobs(self, batch: VideoBatch) -> Tensor:
        """Log of the class probabilities averaged over traces, before temperature scaling, [B, C]."""
        assert batch.prompts is not None
        assert batch.texts is not None
        scores = self.vlm.score(self.policy, batch.prompts, batch.texts)
        asked = closed_set(scores.logprobs, batch.texts, len(self.data.label_names))
        return average_over_traces(label_log_probabilities(asked.scores), asked.owner, len(batch))

    def decide_batch(self, batch: VideoBatch) -> Decisions:
        """Decides by the averaged, temperature-scaled probabilities."""
        logprobs = self.class_logprobs(batch)
        probs = apply_temperature(logprobs, self.temperature)
        traces = [
            tuple(TraceText(record.text, record.answer) for record in self._traces.get(clip.video_id, ()))
            for clip in batch.clips
        ]
        return decide_by_probs(probs, self.data.label_names, traces, unscaled=logprobs.exp())

    def count(self, batch: VideoBatch, decisions: Decisions | None, split: str) -> None:
        """Counts probabilities before and after scaling; clips that could not be read are in both."""
        names = self.data.label_names
        update_metrics(self.scaled_of(split), batch, decisions, names, self.device)
        if decisions is not None and decisions.unscaled is not None:
            decisions = replace(decisions, probs=decisions.unscaled)
        super().count(batch, decisions, split)

    def scaled_of(self, split: str) -> ClassificationMetrics:
        """Returns the metrics of the temperature-scaled probabilities of a split."""
        metrics = self.scaled_metrics[metric_key(split)]
        assert isinstance(metrics, ClassificationMetrics)
        return metrics

    def log_metrics(self, split: str) -> None:
        """Logs ``<split>/*`` before scaling, ``temperature``, and ``ece_scaled``, ``nll_scaled``, ``brier_scaled``."""
        super().log_metrics(split)
        scaled = self.scaled_of(split)
        if int(scaled.confusion().sum()):
            values = scaled.compute()
            self.log_dict({f"{split}/{name}_scaled": values[name] for name in ("ece", "nll", "brier")})
            self.log(f"{split}/temperature", self.temperature)
        scaled.reset()

    # ------------------------------------------------------------------ temperature

    def on_validation_epoch_start(self) -> None:
        """Fits the temperature of the weights as they are, before they are validated."""
        if self.fitting and not self.trainer.sanity_checking:
            self.refresh_temperature()

    def refresh_temperature(self) -> None:
        """Fits the temperature on ``cal``, which serves nothing else."""
        if not self.data.clips("cal"):
            rank_zero_warn("calibration: there is no split cal, so the temperature stays 1")
            return
        logprobs, labels = [], []
        with torch.no_grad(), evaluating(self.policy), self.forward_context():
            for batch in self.data.loader("cal", self.review("all")):
                labelled = batch.labels >= 0
                if bool(labelled.any()):
                    logprobs.append(self.class_logprobs(batch.to(self.device)).float().cpu()[labelled])
                    labels.append(batch.labels[labelled])
        if not labels:
            raise ValueError("calibration: no clip of split cal can be read and has a label, so no temperature fits")
        fit = fit_temperature(torch.cat(logprobs), torch.cat(labels))
        if fit.at_bound:
            rank_zero_warn(
                f"calibration: the temperature fitted on {len(torch.cat(labels))} clips of cal is at its bound, "
                f"{fit.temperature:.2f}: too few clips, or probabilities that say nothing"
            )
        self.temperature, self._temperature_step = fit.temperature, self.trainer.global_step

    # ------------------------------------------------------------------ artefacts

    def lineage(self, folder: Path) -> Lineage:
        """As every stage, with what is needed to run the calibrator."""
        policy: str | None = None
        if self.adapter_path is not None:
            here = self.run_dir / ADAPTER_FOLDER
            inside = folder == here and not self.starts_from_weights
            policy = POLICY if inside else os.path.relpath(Path(self.adapter_path).resolve(), folder.resolve())
        extra = calibrator_extra(self.temperature, self.input, self.loss_kind, policy, self.trace_options)
        return replace(super().lineage(folder), extra=extra)

    def export(self, run_dir: Path) -> Path:
        """Writes the calibrator, and its policy beside it; see the module's docstring."""
        stale = self._temperature_step != self.trainer.global_step
        if stale and self.trainer.state.status != TrainerStatus.INTERRUPTED:
            self.refresh_temperature()
        folder = run_dir / ADAPTER_FOLDER
        copied = self.adapter_path is not None and not self.starts_from_weights
        beside = {POLICY: Path(str(self.adapter_path))} if copied else {}
        save_adapter(self.policy, folder, CALIBRATOR, self.lineage(folder).info(), beside)
        return folder

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As every stage, with the temperature."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["temperature"] = self.temperature

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As every stage, with the temperature."""
        super().on_load_checkpoint(checkpoint)
        self.temperature = checkpoint["temperature"]

    # ------------------------------------------------------------------ how much there is to do

    def work(self, command: str, data: VideoDataModule, trainer: L.Trainer) -> Work | None:
        """As for every stage, with the traces that the policy has to write."""
        work = super().work(command, data, trainer)
        if work is None or command == "predict":
            return work
        clips = {split: len(data.clips(split)) / trainer.world_size for split in ("train", "val", "cal")}
        if self.input == "video" or self.traces is not None:
            return work
        if command == "test":
            return work + self.writing_work(work.clips_read)
        return work + self.writing_work(clips["val"] if command == "validate" else sum(clips.values()))

    def deciding_work(self, clips: float, classes: int) -> Work:
        """All labels behind every trace."""
        return Work(clips_read=clips, texts_scored=clips * self.trace_options.samples * (1 + classes))

    def watching_work(self, clips: float, data: VideoDataModule) -> Work:
        """The temperature is fitted on ``cal`` first, by every rank."""
        return self.deciding_work(clips + len(data.clips("cal")), len(data.label_names))

    def learning_work(self, clips: float, classes: int) -> Work:
        """Every trace, and behind it its label or all of them."""
        labels = 1 if self.loss_kind == "tokens" else classes
        return Work(clips_learnt=clips, texts_learnt=clips * self.trace_options.samples * (1 + labels))
