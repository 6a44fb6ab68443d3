"""When a fit's checkpoints are written: every so many batches, after a validation, at an epoch's end, where it stops.

Always between two batches, when validation and logging of the first are over: GRPO makes several optimizer steps per
batch, so a count of steps (Lightning's ``every_n_train_steps``) would miss, and within a batch there is no state to go
on from but that of a stage that keeps it (``GRPOModule``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel
from torch import Tensor

from vidreason.lightning_modules.fit_progress import FitProgress, batches_done, batches_per_epoch
from vidreason.lightning_modules.interrupts import StopNow, left_whole
from vidreason.lightning_modules.resumable import KEY, by_model_names
from vidreason.lightning_modules.trained_weights import WeightsModule
from vidreason.lightning_modules.unread_clips import NothingReadError
from vidreason.lightning_modules.vlms.loading.weight_folders import read_info


@dataclass(frozen=True)
class CheckpointOptions:
    """Which checkpoints a fit leaves in ``RUN/checkpoints``, beside ``last.ckpt``.

    Args:
        every_n_batches: Batches between two checkpoints; one follows every validation and every epoch, too.
        monitor: Metric that chooses the best, for example ``val/acc``; null keeps only the last.
        mode: Whether more or less of it is better.
        top_k: How many of the best are kept; -1 keeps all.
    """

    every_n_batches: int = 10
    monitor: str | None = None
    mode: Literal["max", "min"] = "max"
    top_k: int = 1

    def __post_init__(self) -> None:
        if self.every_n_batches < 1:
            raise ValueError(f"checkpoint.every_n_batches must be at least 1, got {self.every_n_batches}")
        if self.top_k < -1:
            raise ValueError(f"checkpoint.top_k must be -1 (all) or a number of checkpoints, got {self.top_k}")


EVERY_TEN = CheckpointOptions()


class RunCheckpoint(ModelCheckpoint):
    """Writes ``last.ckpt`` and the best, each with its adapter in a folder beside it (``last_adapter/``).

    Args:
        options: When, and by which metric.
        dirpath: Where to; null is ``checkpoints`` in the run folder.
    """

    def __init__(self, options: CheckpointOptions = EVERY_TEN, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            monitor=options.monitor,
            mode=options.mode,
            save_top_k=options.top_k if options.monitor is not None else 0,
            save_last=True,
            enable_version_counter=False,
        )
        self.options = options
        self._saved_at = 0
        self._validated: dict[str, Tensor] = {}
        self._touched = False
        self._bytes = 0
        self._mended = False

    # ------------------------------------------------------------------ when

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A fit that goes on has just been saved; the process may have fitted before."""
        super().on_train_start(trainer, pl_module)
        self._saved_at, self._validated, self._touched = batches_done(trainer), {}, False
        self._mend_adapter(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing of an earlier fit holds."""
        self._mended = False

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A fit that was at its end has not begun to train."""
        self._mend_adapter(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves where it is time, before the batch is trained on."""
        done = batches_done(trainer)
        in_epoch = done % batches_per_epoch(trainer)
        whole_step = in_epoch % trainer.accumulate_grad_batches == 0
        late = done - self._saved_at >= self.options.every_n_batches or in_epoch == 0
        if whole_step and (self._validated or (late and done > self._saved_at)):
            self._save(trainer)
        self._touched = True  # from here to the end of the batch its state is half done

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """The batch is done."""
        self._touched = False

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Waits for the next batch, or for the end."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes down the metrics by which the next checkpoint, which follows at once, is judged."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._validated = self._monitor_candidates(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the end, when the stage's weights have been exported."""
        if self._validated or batches_done(trainer) > self._saved_at:
            self._save(trainer)
            self._say(trainer, "end of training")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Saves where a fit stops in a state from which it can go on; several ranks do so only where all stop."""
        if isinstance(exception, StopNow):
            return
        asked = left_whole(trainer, exception) or isinstance(exception, NothingReadError)
        alone = trainer.world_size == 1 and not isinstance(exception, OSError)
        started = trainer.global_step > 0 and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if started and (asked or (alone and not self._touched)):
            self._save(trainer)
            self._say(trainer, "interrupted")

    # ------------------------------------------------------------------ what, of a module that does not say it itself

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Says how far the fit is."""
        if not isinstance(pl_module, WeightsModule):
            checkpoint[KEY] = {"progress": FitProgress.of(trainer).state()}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Tells Lightning's loops where they go on."""
        if KEY in checkpoint and not isinstance(pl_module, WeightsModule):
            FitProgress(**checkpoint[KEY]["progress"]).tell(checkpoint["loops"]["fit_loop"])

    # ------------------------------------------------------------------ how

    def _save(self, trainer: L.Trainer) -> None:
        """Writes the best, where the last validation is among them, and the last."""
        self._saved_at, found = batches_done(trainer), self._validated
        self._validated = {}
        if found:
            self._save_topk_checkpoint(trainer, found)
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        for logger in trainer.loggers:
            logger.save()  # what was logged before a checkpoint is not logged again after it
        super()._save_checkpoint(trainer, filepath)
        module = trainer.lightning_module
        if trainer.is_global_zero and isinstance(module, WeightsModule):
            module.export_beside(_adapter_of(filepath))
        if trainer.is_global_zero and self._bytes == 0:
            self._say(trainer, f"the first; one follows every {self.options.every_n_batches} batches")

    def _mend_adapter(self, trainer: L.Trainer) -> None:
        """Writes the adapter of the checkpoint that was restored, where a kill came before it was written."""
        module, path, before = trainer.lightning_module, trainer.ckpt_path, self._mended
        self._mended = True
        if before or not path or not trainer.is_global_zero or not isinstance(module, WeightsModule):
            return
        here = self.dirpath is not None and Path(path).resolve().parent == Path(self.dirpath).resolve()
        folder = _adapter_of(str(path))
        plain = json.loads(json.dumps(module.lineage(folder).info()))
        if here and isinstance(module.policy, PeftModel) and read_info(folder) != plain:
            module.gathered_state = by_model_names(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
            module.export_beside(folder)
            rank_zero_info(f"{folder}: written after a kill that came before it (step {trainer.global_step})")

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        trainer.strategy.remove_checkpoint(_adapter_of(filepath))

    def _say(self, trainer: L.Trainer, why: str) -> None:
        path = Path(self._last_checkpoint_saved)
        self._bytes = path.stat().st_size if path.is_file() else 0
        rank_zero_info(f"{path}: {self._bytes / 1e6:.3g} MB ({why}, step {trainer.global_step})")


def _adapter_of(checkpoint: str) -> Path:
    """The folder beside a checkpoint."""
    path = Path(checkpoint)
    return path.with_name(f"{path.stem}_adapter")
