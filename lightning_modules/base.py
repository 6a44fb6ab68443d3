"""What all stages share beside their weights: deciding about clips, and (``writing.py``) writing about them.

``VLMModule`` is complete by itself: ``vidreason test`` runs it as zero-shot classifier (or, with ``adapter_path``, as
the model of any stage but calibration), ``vidreason predict`` lets it write rationales or traces. A training stage
subclasses it and adds ``training_step``.

Shape letters: B clips, C classes, N texts, L tokens, K samples per clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.prompts import ClipView, LabelScoringView
from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_modules.deciding import class_logprobs, decide_by_answers, decide_by_probs, update_metrics
from vidreason.lightning_modules.interrupts import unless_stopped
from vidreason.lightning_modules.metrics import ClassificationMetrics
from vidreason.lightning_modules.own_traces import OWN_TRACES, TraceOptions, report_failed
from vidreason.lightning_modules.predictions import Decisions, Prediction, decided, undecided
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.work import Work, clips_taken, length_of_fit
from vidreason.lightning_modules.writing import WritingModule
from vidreason.rewards.completion import THINK_FORM, CompletionForm

Decide = Literal["likelihood", "answer"]
GREEDY = Sampling(temperature=0.0)


class VLMModule(WritingModule):
    """A vision-language model that decides about clips and writes about them; the base of every stage.

    Args:
        vlm: The model family and checkpoint (the top-level ``vlm`` section).
        adapter_path: ``adapter/`` or ``weights/`` of an earlier stage; null starts from the base.
        optimizer: The optimizer, without its parameters.
        schedule: Learning rate over the optimizer steps.
        warmup: Warm-up, as a share of all optimizer steps (below 1) or as a number of them (1 and above).
        decide: ``likelihood``: sequence log-likelihood of every class name behind one prefill; ``answer``: generate
            ``samples`` completions and let their answers vote (unparseable ones count as wrong).
        samples: Completions per clip for ``answer``.
        sampling: How completions for ``answer`` are sampled; temperature 0 is greedy.
        predict: What ``vidreason predict`` writes: descriptions or traces that end in an answer.
        traces_sampled: How ``predict``, and a stage whose ``traces`` are null, sample their texts.
        batch_size: Clips per training batch; null takes the data section's. It belongs to the method, so that any data
            section will do.
        seed: Seed of all sampling; null takes ``seed_everything``'s.
        completion: Which blocks a completion has: ``mode`` think, no_think or answer_first; ``confidence`` at the end.
    """

    def __init__(
        self,
        vlm: VLM,
        adapter_path: str | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
        warmup: float = 0.0,
        decide: Decide = "likelihood",
        samples: int = 1,
        sampling: Sampling = GREEDY,
        predict: Literal["describe", "reason"] = "describe",
        traces_sampled: TraceOptions = OWN_TRACES,
        batch_size: int | None = None,
        seed: int | None = None,
        completion: CompletionForm = THINK_FORM,
    ) -> None:
        super().__init__(vlm, adapter_path, optimizer, schedule, warmup, seed)
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.decide: Decide = decide
        self.samples = samples
        self.sampling = sampling
        self.predict = predict
        self.trace_options = traces_sampled
        self.completion = completion
        self.batch_size = batch_size
        self.metrics = nn.ModuleDict()

    @property
    def stage_name(self) -> str:
        """As for every stage; this class by itself is no training stage."""
        return "zero_shot" if type(self) is VLMModule else super().stage_name

    # ------------------------------------------------------------------ what it sees

    def setup(self, stage: str) -> None:
        """Gives the data module its views; the data are ready here, the weights are not."""
        self.data.connect(batch_size=self.batch_size)
        if stage == "predict":
            self.trainer.predict_loop.return_predictions = False  # they go to the callbacks, not into memory
            self.data.connect(train_view=self.written_view(), eval_view=self.written_view())
            return
        self.data.connect(train_view=self.train_view(), eval_view=self.eval_view())
        splits = self.data.test_split_names if stage == "test" else ("val",)
        self.metrics = nn.ModuleDict({metric_key(s): self.new_metrics() for s in splits})

    def train_view(self) -> ClipView:
        """What a clip shows in training."""
        return self.eval_view()

    def eval_view(self) -> ClipView:
        """What a clip shows when it is decided."""
        return LabelScoringView(self.task) if self.decide == "likelihood" else self.reason_view()

    # ------------------------------------------------------------------ deciding

    def class_logprobs(self, batch: VideoBatch) -> Tensor:
        """Log of the class probabilities of the B readable clips of a batch, [B, C]."""
        scores = self.vlm.score(self.policy, batch.prompts, batch.texts)
        return class_logprobs(scores.logprobs, batch.texts, len(self.data.label_names), len(batch))

    def decide_batch(self, batch: VideoBatch) -> Decisions:
        """Decides about the B readable clips of a batch."""
        if self.decide == "answer":
            options = TraceOptions(samples=self.samples, sampling=self.sampling)
            return decide_by_answers(self.sample_texts(batch, options), self.data.label_names)
        return decide_by_probs(self.class_logprobs(batch).exp(), self.data.label_names)

    def evaluate_batch(self, batch: VideoBatch, split: str) -> dict[str, tuple[Prediction, ...]]:
        """Decides about a batch and updates the split's metrics; clips that could not be read count as wrong.

        Returns:
            ``{"predictions": ...}``, one line for every clip of the batch, for callbacks.
        """
        if not batch.sample_mask.all():
            return {"predictions": ()}
        report_failed(batch, f"counted wrong in {split}")
        names = self.data.label_names
        predictions = [undecided(failed, split, names) for failed in batch.failed]
        decisions = self.decide_batch(batch) if len(batch) else None
        if decisions is not None:
            predictions += [decided(clip, split, b, decisions, names) for b, clip in enumerate(batch.clips)]
        self.count(batch, decisions, split)
        return {"predictions": tuple(predictions)}

    def count(self, batch: VideoBatch, decisions: Decisions | None, split: str) -> None:
        """Adds the labelled clips of a batch, readable or not, to the split's metrics."""
        update_metrics(self.metrics_of(split), batch, decisions, self.data.label_names, self.device)

    def new_metrics(self) -> ClassificationMetrics:
        """Returns the metrics of one split."""
        return ClassificationMetrics(self.data.label_names)

    def metrics_of(self, split: str) -> ClassificationMetrics:
        """Returns the metrics of a split."""
        metrics = self.metrics[metric_key(split)]
        assert isinstance(metrics, ClassificationMetrics)
        return metrics

    def log_metrics(self, split: str) -> None:
        """Logs the metrics of a split as ``<split>/<name>`` and resets them."""
        metrics = self.metrics_of(split)
        if not int(metrics.confusion().sum()):
            return
        self.log_dict({f"{split}/{name}": value for name, value in metrics.compute().items()})
        metrics.reset()

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> Any:
        """Decides about a batch of ``val``; once a signal has come to one of several ranks, it passes over the rest."""
        nothing: dict[str, tuple[Prediction, ...]] = {"predictions": ()}
        return unless_stopped(self.trainer.strategy, partial(self.evaluate_batch, batch, "val"), nothing)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs ``vision_cache/*``."""
        self.log_vision_cache()

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/*``."""
        self.log_metrics("val")
        self.log_vision_cache()

    def test_step(self, batch: VideoBatch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Decides about a batch of a test split."""
        return self.evaluate_batch(batch, self.data.test_split_names[dataloader_idx])

    def on_test_epoch_end(self) -> None:
        """Logs ``<split>/*`` of every test split."""
        for split in self.data.test_split_names:
            self.log_metrics(split)
        self.log_vision_cache()

    def log_vision_cache(self) -> None:
        """Logs, where videos were looked up since the last time, how many were found and how much is kept."""
        cache = self.vlm.vision_cache
        taken = None if cache is None else cache.take_statistics()
        if taken is not None and taken.lookups:
            rates = {"vision_cache/hit_rate": taken.hits / taken.lookups, "vision_cache/gb": taken.gb}
            self.log_dict(rates, batch_size=taken.lookups)

    # ------------------------------------------------------------------ how much there is to do

    min_steps: int = 0
    """Optimizer steps that a fit takes at least"""

    def work(self, command: str, data: VideoDataModule, trainer: L.Trainer) -> Work | None:
        """Counts what a command will do, before anything runs.

        Args:
            command: ``fit``, ``validate``, ``test`` or ``predict``.
            data: Where the clips are; it is prepared.
            trainer: As configured.

        Returns:
            What one rank does; None where a fit does what only a subclass knows, or has no end.
        """
        ranks = trainer.world_size

        def share(splits: Sequence[str], limit: float | None) -> float:
            clips = sum(len(data.clips(split)) for split in splits)
            return clips_taken(clips, data.eval_batch_size * ranks, limit) / ranks

        if command == "predict":
            return self.writing_work(share(data.predict_splits, trainer.limit_predict_batches))
        classes = len(data.label_names)
        if command == "test":
            return self.deciding_work(share(data.test_split_names, trainer.limit_test_batches), classes)
        validated = share(("val",), trainer.limit_val_batches)
        if command == "validate":
            return self.deciding_work(validated, classes)
        size, clips = self.batch_size or data.batch_size, len(data.clips("train"))
        taken = clips_taken(clips, size * ranks, trainer.limit_train_batches)
        fit = length_of_fit(trainer, taken, size * ranks, self.min_steps, self.updates_per_batch)
        if fit is None or (learning := self.learning_work(fit.batches * min(size, clips), classes)) is None:
            return None
        return learning + self.watching_work(validated, data) * fit.validations

    def deciding_work(self, clips: float, classes: int) -> Work:
        """What it takes to decide about ``clips``."""
        if self.decide == "answer":
            return Work(clips_read=clips, texts_written=clips * self.samples)
        return Work(clips_read=clips, texts_scored=clips * classes)

    def watching_work(self, clips: float, data: VideoDataModule) -> Work:
        """What a validation on ``clips`` takes within a fit."""
        return self.deciding_work(clips, len(data.label_names))

    def learning_work(self, clips: float, classes: int) -> Work | None:
        """What it takes to learn from ``clips``, counted as often as they come; None where a subclass has not said."""
        return None


def metric_key(split: str) -> str:
    """Returns a name under which a split's metrics can be a submodule."""
    return split.replace(".", "_")
