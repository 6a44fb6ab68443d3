"""Exports the weights that a stage hands on: ``adapter/`` (or ``weights/``) in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.fit.stopping import stopped_consistently
from vidreason.lightning_modules.vlms.loading.sharding import unsharded
from vidreason.run_folder import ADAPTER_FOLDER, WEIGHTS_FOLDER
from vidreason.signals import StopNow

EXPORTED = (ADAPTER_FOLDER, WEIGHTS_FOLDER)


class AdapterCheckpoint(L.Callback):
    """Exports the trained weights: those of the best validation so far, or the last ones at the end of the fit.

    An interrupted fit exports too (with ``monitor`` it has already done so). A failed fit does not, so that it never
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
        """Exports if the monitored metric is better than ever before in this fit; the earlier of equal ones stays."""
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
        """Exports the last weights if no validation has chosen any."""
        if self.best is None:
            self._export(trainer, pl_module, "end of training")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Exports what has been learnt so far after Ctrl-C."""
        learnt = trainer.state.fn == "fit" and trainer.global_step > 0 and self.best is None
        at_once = isinstance(exception, StopNow) or trainer.world_size > 1
        if learnt and (
            stopped_consistently(trainer, exception) or (isinstance(exception, KeyboardInterrupt) and not at_once)
        ):
            self._export(trainer, pl_module, "interrupted")

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value, so that a resumed fit only replaces the adapter by a better one."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best value."""
        self.best = state_dict["best"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets an earlier fit of this process, and that of a checkpoint whose weights lie in another run folder."""
        if not trainer.ckpt_path or not any(Path(trainer.default_root_dir, name).is_dir() for name in EXPORTED):
            self.best = None

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule, why: str) -> None:
        assert isinstance(pl_module, VLMModule)
        with unsharded(pl_module.policy):
            if trainer.is_global_zero:
                folder = pl_module.export(Path(trainer.default_root_dir))
                rank_zero_info(f"{folder} written ({why}, step {trainer.global_step})")
        trainer.strategy.barrier("adapter_checkpoint")
