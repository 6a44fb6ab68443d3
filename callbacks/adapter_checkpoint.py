"""Exports the trained weights of a stage to ``adapter/`` (or ``weights/``) in its run folder."""

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
    """Exports the weights after every validation that is the best so far, or once at the end of the fit.

    An interrupted fit exports its last weights unless a validation has already exported some. A failed fit exports
    nothing, so that it never replaces a good adapter.

    Args:
        monitor: Metric that selects the weights, for example ``val/acc``; null exports those of the end of the fit.
        mode: ``max`` if a higher value is better, ``min`` if a lower one is.
    """

    def __init__(self, monitor: str | None = None, mode: Literal["max", "min"] = "max") -> None:
        self.monitor = monitor
        self.mode = mode
        self.best: float | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports the weights if the monitored metric has improved; on a tie the earlier weights stay.

        Raises:
            ValueError: If the metric is not logged.
        """
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
        """Exports the last weights if no validation has exported any."""
        if self.best is None:
            self._export(trainer, pl_module, "end of training")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Exports the weights of an interrupted fit."""
        learnt = trainer.state.fn == "fit" and trainer.global_step > 0 and self.best is None
        # a second Ctrl-C asks for no files; several ranks stopped at different places would wait in `unsharded`
        at_once = isinstance(exception, StopNow) or trainer.world_size > 1
        if learnt and (
            stopped_consistently(trainer, exception) or (isinstance(exception, KeyboardInterrupt) and not at_once)
        ):
            self._export(trainer, pl_module, "interrupted")

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value, so that a resumed fit replaces the adapter only by a better one."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best value."""
        self.best = state_dict["best"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Resets the best value of an earlier fit of this process; Lightning restores a checkpoint after this hook."""
        self.best = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Resets a restored best value if its weights are not in the run folder, as after resuming into another."""
        # Not in on_fit_start, which comes before the checkpoint is restored under FSDP2 and after it otherwise.
        if not any(Path(trainer.default_root_dir, name).is_dir() for name in EXPORTED):
            self.best = None

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule, why: str) -> None:
        assert isinstance(pl_module, VLMModule)
        with unsharded(pl_module.policy):  # collective: all ranks enter
            if trainer.is_global_zero:
                folder = pl_module.export(Path(trainer.default_root_dir))
                rank_zero_info(f"{folder} written ({why}, step {trainer.global_step})")
        trainer.strategy.barrier("adapter_checkpoint")  # no rank may read or exit before the files are complete
