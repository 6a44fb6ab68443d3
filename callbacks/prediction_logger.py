"""Logs decisions to TensorBoard: a few clips as text and as film strips, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor

from vidreason.callbacks.film_strip import captioned_strips, film_strip
from vidreason.callbacks.tensorboard_text import log_image, log_text, markdown_table
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.decisions.predictions import Prediction


class PredictionLogger(L.Callback):
    """Logs the first decisions of each split and its confusion matrix.

    Args:
        clips: Clips per table.
        confusion: Whether to draw the matrix.
        strips: Number of clips in the table whose frames are shown.
    """

    def __init__(self, clips: int = 8, confusion: bool = True, strips: int = 4) -> None:
        self.clips = clips
        self.strips = strips
        self.confusion = confusion
        self._shown: list[Prediction] = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collects the predictions of the first clips of each split."""
        if not isinstance(outputs, Mapping):
            return
        for prediction in outputs.get("predictions", ()):
            if sum(p.split == prediction.split for p in self._shown) < self.clips:
                self._shown.append(prediction)

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
        shown, self._shown = self._shown, []
        if trainer.sanity_checking:
            return
        for split in splits:
            predictions = [p for p in shown if p.split == split]
            # of several ranks, one may have no labelled clip of a split while others have
            if trainer.world_size == 1 and not any(p.label is not None for p in predictions):
                continue
            metrics = pl_module.metrics_of(split)
            counted = metrics.clips() > 0  # collective: every rank has to call it
            if trainer.is_global_zero and counted:
                log_text(trainer, f"{split}/decisions", prediction_table(predictions))
                if self.confusion:
                    log_image(trainer, f"{split}/confusion", metrics.plain.draw_confusion(split))
                if sheet := self._sheet(pl_module, split, predictions[: self.strips]):
                    log_image(trainer, f"{split}/clips", captioned_strips(sheet))

    def _sheet(self, module: VLMModule, split: str, predictions: list[Prediction]) -> list[tuple[str, Tensor]]:
        """Returns the readable clips as (caption, film strip [3, H, W])."""
        clips = {clip.video_id: clip for clip in module.data.clips(split)}
        drawn = [(p, film_strip(clips[p.video_id].path, clips[p.video_id].stretch)) for p in predictions]
        return [(_verdict(p), strip) for p, strip in drawn if strip is not None]


def _verdict(p: Prediction) -> str:
    return f"{p.video_id}: is {p.label}, decided {p.pred or 'nothing'}" + (
        f" at {max(p.probs.values()):.2f}" if p.probs else ""
    )


def prediction_table(predictions: list[Prediction]) -> str:
    """Returns a Markdown table, one row per clip."""
    rows = [
        [
            p.video_id,
            p.label or "",
            "failed" if p.failed else (p.pred or "unparsed"),
            max(p.probs.values()) if p.probs else "",
            p.traces[0].text if p.traces else "",
        ]
        for p in predictions
    ]
    return markdown_table(["clip", "label", "decision", "highest probability", "first trace"], rows)
