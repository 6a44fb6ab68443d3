"""Shows what was decided in TensorBoard: a few clips as text, and the confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L

from vidreason.callbacks.tensorboard_text import log_image, log_text, markdown_table
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.predictions import Prediction


class PredictionLogger(L.Callback):
    """Writes the first decisions of each split, and its confusion matrix.

    Args:
        clips: Clips per table.
        confusion: Whether to draw the matrix.
    """

    def __init__(self, clips: int = 8, confusion: bool = True) -> None:
        self.clips = clips
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
        """Remembers the first clips."""
        self._remember(outputs)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Remembers the first clips of each split."""
        self._remember(outputs)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes ``val``; the module resets its metrics after this."""
        self._write(trainer, pl_module, ("val",))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes every test split."""
        assert isinstance(pl_module, VLMModule)
        self._write(trainer, pl_module, pl_module.data.test_split_names)

    def _remember(self, outputs: Any) -> None:
        if not isinstance(outputs, Mapping):
            return
        for prediction in outputs.get("predictions", ()):
            if sum(p.split == prediction.split for p in self._shown) < self.clips:
                self._shown.append(prediction)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, splits: tuple[str, ...]) -> None:
        assert isinstance(pl_module, VLMModule)
        shown, self._shown = self._shown, []
        if trainer.sanity_checking:
            return
        for split in splits:
            predictions = [p for p in shown if p.split == split]
            if not any(p.label is not None for p in predictions):
                continue
            picture = pl_module.metrics_of(split).draw_confusion(split) if self.confusion else None  # on all ranks
            if trainer.is_global_zero:
                log_text(trainer, f"{split}/decisions", prediction_table(predictions))
                if picture is not None:
                    log_image(trainer, f"{split}/confusion", picture)


def prediction_table(predictions: list[Prediction]) -> str:
    """Returns a Markdown table, one row per clip."""
    rows = [
        [
            p.video_id,
            p.label or "",
            "failed" if p.failed else (p.pred or "unparsed"),
            max(p.probs.values()),
            p.traces[0].text if p.traces else "",
        ]
        for p in predictions
    ]
    return markdown_table(["clip", "label", "decision", "highest probability", "first trace"], rows)
