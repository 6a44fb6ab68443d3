"""One progress bar for a whole fit, test or prediction, with the time left until its end."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

_METRICS_SHOWN = 4


class RunProgress(ProgressBar):
    """Shows how much of the whole fit (not of the epoch), test or prediction is done and how long the rest takes.

    Args:
        refresh_s: Seconds between two refreshes.
    """

    def __init__(self, refresh_s: float = 1.0) -> None:
        super().__init__()
        self.refresh_s = refresh_s
        self._bars: list[tqdm[Any]] = []
        self._enabled = True

    @property
    def is_enabled(self) -> bool:
        """True if bars and lines are shown; ``LightningModule.print`` reads it."""
        return self._enabled

    def disable(self) -> None:
        """Hides everything; Lightning calls it on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Shows bars and lines again."""
        self._enabled = True

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Prints above the bars."""
        if self._enabled:
            tqdm.write(sep.join(map(str, args)), file=sys.stderr)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the bar of the fit."""
        self._open(pl_module, "training", fit_length(trainer), fit_position(trainer), "step")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar of the fit."""
        bar = self._bars[-1]
        bar.update(fit_position(trainer) - bar.n)
        shown = {k: v for k, v in self.get_metrics(trainer, pl_module).items() if k != "v_num"}  # version of the logger
        bar.set_postfix(dict(list(shown.items())[:_METRICS_SHOWN]), refresh=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the bar of the fit."""
        self._close()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens a bar that disappears at the end of the validation."""
        total = sum(map(int, trainer.num_val_batches)) if trainer.num_val_batches else 0
        self._open(pl_module, "validating", total, 0, "batch", leave=False)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        self._bars[-1].update()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the bar."""
        self._close()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the bar of all test splits."""
        self._open(pl_module, "testing", sum(map(int, trainer.num_test_batches)), 0, "batch")

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        self._bars[-1].update()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the bar."""
        self._close()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the bar of all predict splits."""
        self._open(pl_module, "writing", sum(map(int, trainer.num_predict_batches)), 0, "batch")

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        self._bars[-1].update()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Closes all bars, so that the error is printed below them."""
        while self._bars:
            self._close()

    def _open(
        self, module: L.LightningModule, what: str, total: int | None, done: int, unit: str, leave: bool = True
    ) -> None:
        name = getattr(module, "stage_name", type(module).__name__)
        self._bars.append(
            tqdm(
                total=total,
                initial=done,
                desc=f"{name}: {what}",
                unit=unit,
                disable=not self._enabled,
                leave=leave,
                mininterval=self.refresh_s,
                dynamic_ncols=True,
                file=sys.stderr,
            )
        )

    def _close(self) -> None:
        if self._bars:
            self._bars.pop().close()


def fit_length(trainer: L.Trainer) -> int | None:
    """Returns the length of a fit: optimizer steps if ``max_steps`` is set, else batches; None if it is unbounded."""
    if trainer.max_steps != -1:
        return int(trainer.max_steps)
    epochs = trainer.max_epochs
    if epochs in (None, -1) or trainer.num_training_batches == float("inf"):
        return None
    return int(epochs or 0) * int(trainer.num_training_batches)


def fit_position(trainer: L.Trainer) -> int:
    """Returns the position of a fit, in optimizer steps if ``max_steps`` is set, else in batches."""
    # total_batch_idx is the index of the last batch, -1 before the first
    return trainer.global_step if trainer.max_steps != -1 else trainer.fit_loop.total_batch_idx + 1
