"""Logs decisions to TensorBoard: wrong and sure ones as text and film strips, reliability, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from vidreason.callbacks.film_strip import captioned_strips, film_strip
from vidreason.callbacks.tensorboard_text import log_image, log_text, markdown_table, quoted_texts
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.decisions.pictures import draw_confusion, draw_reliability
from vidreason.lightning_modules.decisions.predictions import Prediction


class PredictionLogger(L.Callback):
    """Logs what the decisions about each split look like; of several processes, those of the first.

    ``<split>/decisions`` has the same first clips every time, ``<split>/wrong_and_sure`` the wrong decisions of the
    highest confidence, as text and as film strips.

    Args:
        clips: Clips per text.
        pictures: Whether to draw confusion matrix and reliability.
        strips: Number of wrong decisions whose frames are shown.
    """

    def __init__(self, clips: int = 8, pictures: bool = True, strips: int = 4) -> None:
        self.clips = clips
        self.strips = strips
        self.pictures = pictures
        self._seen: list[Prediction] = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collects the predictions about labelled clips."""
        if isinstance(outputs, Mapping):
            self._seen += [p for p in outputs.get("predictions", ()) if p.label is not None]

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs split ``val``; the module resets its metrics after this hook."""
        self._write(trainer, pl_module, ("val",))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs every test split."""
        assert isinstance(pl_module, VLMModule)
        self._write(trainer, pl_module, pl_module.data.test_split_names)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, splits: tuple[str, ...]) -> None:
        assert isinstance(pl_module, VLMModule)
        seen, self._seen = self._seen, []
        if trainer.sanity_checking:
            return
        for split in splits:
            predictions = [p for p in seen if p.split == split]
            # of several ranks, one may have no labelled clip of a split while others have
            if trainer.world_size == 1 and not predictions:
                continue
            metrics = pl_module.metrics_of(split)
            counted = metrics.clips() > 0  # collective: every rank has to call it
            if not (trainer.is_global_zero and counted):
                continue
            wrong = wrong_and_sure(predictions)[: self.clips]
            log_text(trainer, f"{split}/decisions", prediction_table(predictions[: self.clips]))
            log_text(trainer, f"{split}/wrong_and_sure", prediction_table(wrong))
            if self.pictures:
                counts = metrics.plain.confusion()
                log_image(trainer, f"{split}/confusion", draw_confusion(counts, metrics.label_names, split))
                if sure := [p for p in predictions if p.probs]:
                    right = torch.tensor([p.right for p in sure])
                    confidence = torch.tensor([_confidence(p) for p in sure])
                    title = split if trainer.world_size == 1 else f"{split}, {len(sure)} clips of rank 0"
                    log_image(trainer, f"{split}/reliability", draw_reliability(confidence, right, title))
            if sheet := self._sheet(pl_module, split, wrong[: self.strips]):
                log_image(trainer, f"{split}/wrong_and_sure", captioned_strips(sheet))

    def _sheet(self, module: VLMModule, split: str, predictions: Sequence[Prediction]) -> list[tuple[str, Tensor]]:
        """Returns the readable clips as (caption, film strip [3, H, W])."""
        clips = {clip.video_id: clip for clip in module.data.clips(split)}
        drawn = [(p, film_strip(clips[p.video_id].path, clips[p.video_id].stretch)) for p in predictions]
        return [(_verdict(p), strip) for p, strip in drawn if strip is not None]


def wrong_and_sure(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Returns the wrong decisions, those of the highest confidence first and those without any last."""
    return sorted((p for p in predictions if not p.right), key=lambda p: -_confidence(p))


def prediction_table(predictions: Sequence[Prediction]) -> str:
    """Returns a Markdown table, one row per clip, and below it the first trace of each."""
    rows = [
        [
            p.video_id,
            p.label or "",
            "failed" if p.failed else (p.pred or "unparsed"),
            _confidence(p) if p.probs else "",
        ]
        for p in predictions
    ]
    texts = [(f"{p.video_id}, is {p.label}", p.traces[0].text) for p in predictions if p.traces]
    table = markdown_table(["clip", "label", "decision", "confidence"], rows) if rows else "none"
    return f"{table}\n\n{quoted_texts(texts)}".rstrip()


def _confidence(p: Prediction) -> float:
    """Returns the probability of the decision, or the largest one without a decision; 0 without probabilities."""
    return p.probs.get(p.pred or "", max(p.probs.values())) if p.probs else 0.0


def _verdict(p: Prediction) -> str:
    sure = f" at {_confidence(p):.2f}" if p.probs else ""
    return f"{p.video_id}: is {p.label}, decided {p.pred or 'nothing'}{sure}"
