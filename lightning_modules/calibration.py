"""Intuitive calibration, DeepIntuit's last stage (arXiv 2603.10300): a reviewer that reads the policy's traces.

The policy samples K traces per clip, all kept, right or wrong. A second adapter on the same base, the *calibrator*, is
shown video and trace and learns the label; at test its probabilities are averaged over K traces, then
temperature-scaled.

Deviations from the paper:
    1. One base in memory with two adapters; the calibrator starts as a copy of the policy's adapter (after full
       fine-tuning: a fresh adapter on the policy's weights).
    2. K traces at test as in training, at the same temperature, and a temperature fitted on ``cal``.

Its weights are in ``calibrator.py``, the temperature in ``temperature.py``, what it hands on in ``calibrator_info.py``.

Shape letters: B clips, K traces per clip, C classes, R = traces in a batch, N texts, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.prompts import ClipView, ReviewView
from vidreason.datamodules.traces import TraceRecord, TraceStore
from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_modules.calibrator import CalibratorModule
from vidreason.lightning_modules.calibrator_info import CalibratorInput
from vidreason.lightning_modules.deciding import closed_set, decide_by_probs
from vidreason.lightning_modules.functional.calibration import apply_temperature
from vidreason.lightning_modules.functional.losses import weighted_text_loss
from vidreason.lightning_modules.functional.reductions import count_or_one, label_log_probabilities
from vidreason.lightning_modules.own_traces import OWN_TRACES, TraceOptions
from vidreason.lightning_modules.predictions import Decisions, TraceText
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.work import Work
from vidreason.rewards.completion import THINK_FORM, CompletionForm

CALIBRATOR_LORA = LoRAOptions()


class CalibrationModule(CalibratorModule):
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
    weighs_clips: ClassVar[bool] = True

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
        self._traces: dict[str, tuple[TraceRecord, ...]] = {}

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
        data.connect(train_view=self.train_view(), eval_view=self.eval_view())

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
        logprobs = self.vlm.score(self.policy, batch.prompts, batch.texts).logprobs
        texts = batch.valid_texts
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

    def decide_batch(self, batch: VideoBatch) -> Decisions:
        """Decides by the averaged, temperature-scaled probabilities."""
        logprobs = self.class_logprobs(batch)
        probs = apply_temperature(logprobs, self.temperature)
        traces = [
            tuple(TraceText(record.text, record.answer) for record in self._traces.get(clip.video_id, ()))
            for clip in batch.clips
        ]
        return decide_by_probs(probs, self.data.label_names, traces, unscaled=logprobs.exp())

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

    def learning_work(self, clips: float, classes: int) -> Work:
        """Every trace, and behind it its label or all of them."""
        labels = 1 if self.loss_kind == "tokens" else classes
        return Work(clips_learnt=clips, texts_learnt=clips * self.trace_options.samples * (1 + labels))
