"""Asks, where nothing is half done, whether a signal wants the fit to end (``lightning_modules/interrupts.py``)."""

from __future__ import annotations

from typing import Any

import lightning as L

from vidreason.lightning_modules.interrupts import check_stop, defer, stop_together


class Stopping(L.Callback):
    """Lets Ctrl-C and SIGTERM wait for the next place from which a fit can go on."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on signals wait."""
        defer(True)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two batches."""
        stop_together(trainer.strategy)

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """In a validation, which is made again; several ranks leave it together at its end."""
        if trainer.world_size == 1:
            check_stop()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before ranks bring their metrics together."""
        stop_together(trainer.strategy)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What follows is the export of what was learnt, which is made again where it is interrupted."""
        defer(False)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """A second signal ends the process at once."""
        defer(False)
