"""Writes what a stage hands on: ``adapter/`` (or ``weights/``) in the run folder."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.interrupts import StopNow, left_whole
from vidreason.lightning_modules.vlms.loading.sharding import whole
from vidreason.run_folder import ADAPTER_FOLDER, WEIGHTS_FOLDER

EXPORTED = (ADAPTER_FOLDER, WEIGHTS_FOLDER)


class AdapterCheckpoint(L.Callback):
    """Exports the trained weights: the best of the validations so far, or the last at the end of the fit.

    An interrupted fit exports too (with ``monitor`` it has done so already); one that failed does not, so that it never
    replaces a good adapter.

    Args:
        monitor: Metric that chooses, for example ``val/acc``; null takes the weights at the end.
        mode: Whether more or less of it is better.
    """

    def __init__(self, monitor: str | None = None, mode: Literal["max", "min"] = "max") -> None:
        self.monitor = monitor
        self.mode = mode
        self.best: float | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports where the monitored metric is better than ever before in this fit; the earlier of equals stays."""
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            found = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise ValueError(f"AdapterCheckpoint monitors {self.monitor!r}, which is not logged; logged are: {found}")
        value = float(trainer.callback_metrics[self.monitor])
        if self.best is None or (value > self.best if self.mode == "max" else value < self.best):
            self._export(trainer, pl_module, f"best {self.monitor} so far, {value:.4f}")
            self.best = value

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports the last weights where no validation has chosen any."""
        if self.best is None:
            self._export(trainer, pl_module, "end of training")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Exports after Ctrl-C what has been learnt so far."""
        learnt = trainer.state.fn == "fit" and trainer.global_step > 0 and self.best is None
        at_once = isinstance(exception, StopNow) or trainer.world_size > 1
        if learnt and (left_whole(trainer, exception) or (isinstance(exception, KeyboardInterrupt) and not at_once)):
            self._export(trainer, pl_module, "interrupted")

    def state_dict(self) -> dict[str, Any]:
        """The best value, so that a resumed fit only replaces the adapter by a better one."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the best value."""
        self.best = state_dict["best"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets an earlier fit of this process, and that of a checkpoint whose weights lie in another run folder."""
        assert isinstance(pl_module, VLMModule)
        if not trainer.ckpt_path or not any((pl_module.run_dir / name).is_dir() for name in EXPORTED):
            self.best = None

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule, why: str) -> None:
        assert isinstance(pl_module, VLMModule)
        with whole(pl_module.policy):
            if trainer.is_global_zero:
                folder = pl_module.export(pl_module.run_dir)
                rank_zero_info(f"{folder} written ({why}, step {trainer.global_step})")
        trainer.strategy.barrier("adapter_checkpoint")
