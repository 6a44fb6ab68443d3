"""Writes checkpoints during a fit: every n batches, after a validation, at the end of an epoch, and when it stops.

A checkpoint is always written between two batches, after the validation and the logging of the first. Lightning's
``every_n_train_steps`` does not fit: GRPO makes several optimizer steps per batch and cannot resume within a batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel
from torch import Tensor, nn

from vidreason.lightning_internals import (
    CheckpointWriter,
    batches_done,
    batches_per_epoch,
    between_steps,
)
from vidreason.lightning_modules.fit.skip_unreadable import TooManyUnreadableError
from vidreason.lightning_modules.fit.stopping import stopped_consistently
from vidreason.lightning_modules.functional.finite import NonFiniteError
from vidreason.lightning_modules.vlms.loading.weight_folders import read_info
from vidreason.lightning_modules.weights.lineage import Lineage
from vidreason.signals import StopNow


@dataclass(frozen=True)
class CheckpointOptions:
    """Options of the checkpoints in ``RUN/checkpoints``; ``last.ckpt`` is always there.

    Args:
        every_n_batches: Batches between two checkpoints; one is also written after every validation and epoch.
        monitor: Metric that ranks checkpoints, for example ``val/acc``; null keeps only the last.
        mode: Whether larger (``max``) or smaller (``min``) values are better.
        top_k: Number of best checkpoints to keep; -1 keeps all.
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


class ExportsAdapter(Protocol):
    """The attributes of a stage that :class:`RunCheckpoint` needs to write an adapter beside a checkpoint."""

    policy: nn.Module

    def lineage(self, folder: Path) -> Lineage:
        """Returns the origin of the weights in ``folder``."""
        ...

    def export_adapter(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes the trained adapter to ``folder``; ``state`` holds its weights by their names in the model."""
        ...


class RunCheckpoint(CheckpointWriter):
    """Writes ``last.ckpt`` and the best checkpoints, each with its adapter in a folder beside it (``last_adapter/``).

    Args:
        options: Frequency and ranking of checkpoints.
        dirpath: Folder of the checkpoints; null is ``checkpoints`` in the run folder.
    """

    def __init__(self, options: CheckpointOptions = CheckpointOptions(), dirpath: str | None = None) -> None:
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
        self._within_batch = False
        self._bytes = 0
        self._adapter_checked = False

    # ------------------------------------------------------------------ when

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Resets the state of an earlier fit of this process."""
        self._adapter_checked = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the count of batches since the last checkpoint, at which a resumed fit begins."""
        super().on_train_start(trainer, pl_module)
        self._saved_at, self._validated, self._within_batch = batches_done(trainer), {}, False
        self._restore_adapter_folder(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves before the batch is trained on, if a checkpoint is due."""
        done = batches_done(trainer)
        epoch_ended = done % batches_per_epoch(trainer) == 0
        due = done - self._saved_at >= self.options.every_n_batches or epoch_ended
        if between_steps(trainer) and (self._validated or (due and done > self._saved_at)):
            self._save(trainer)
        self._within_batch = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Marks the batch as finished; its checkpoint is written after validation and logging."""
        self._within_batch = False

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Does nothing: the checkpoint of an epoch is written before the next batch or at the end of training."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stores the metrics that rank the next checkpoint, which is written before the next batch."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._validated = self.candidates(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the end of the fit, after the stage has exported its weights."""
        if self._validated or batches_done(trainer) > self._saved_at:
            self._save(trainer)
            self._report(trainer, "end of training")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Handles a resumed fit that had already ended, for which ``on_train_start`` does not run."""
        self._restore_adapter_folder(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Saves if the fit stops in a state that can be resumed; on several ranks, only if all stop together."""
        if isinstance(exception, StopNow | NonFiniteError):
            return
        # Saving is a collective operation, and an OSError may come from a full disk, on which it would fail again.
        together = stopped_consistently(trainer, exception) or isinstance(exception, TooManyUnreadableError)
        alone = trainer.world_size == 1 and not isinstance(exception, OSError)
        started = trainer.global_step > 0 and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if started and between_steps(trainer) and (together or (alone and not self._within_batch)):
            self._save(trainer)
            self._report(trainer, "interrupted")

    # ------------------------------------------------------------------ how

    def _save(self, trainer: L.Trainer) -> None:
        self._saved_at, metrics = batches_done(trainer), self._validated
        self._validated = {}
        if metrics:
            self.write_best(trainer, metrics)
        self.write_last(trainer)

    def after_save(self, trainer: L.Trainer, path: Path) -> None:
        """Writes the adapter beside the checkpoint."""
        if not trainer.is_global_zero:
            return
        _write_adapter(trainer, path)
        if self._bytes == 0:
            self._report(trainer, f"the first; one follows every {self.options.every_n_batches} batches")

    def after_remove(self, trainer: L.Trainer, path: Path) -> None:
        """Removes the adapter of a checkpoint that was removed."""
        trainer.strategy.remove_checkpoint(_adapter_folder(path))

    def _restore_adapter_folder(self, trainer: L.Trainer) -> None:
        """Writes the adapter of the restored checkpoint if the process was killed between writing the two."""
        path, checked = trainer.ckpt_path, self._adapter_checked
        self._adapter_checked = True
        if checked or not path or not trainer.is_global_zero or self.dirpath is None:
            return
        path, stage = Path(path), _stage_with_adapter(trainer)
        if stage is None or path.resolve().parent != Path(self.dirpath).resolve():
            return
        folder = _adapter_folder(path)
        # Compared after a round trip through JSON, which turns tuples into lists.
        if read_info(folder) != json.loads(json.dumps(stage.lineage(folder).info())):
            _write_adapter(trainer, path)
            rank_zero_info(f"{folder}: written again, a kill had come before it (step {trainer.global_step})")

    def _report(self, trainer: L.Trainer, why: str) -> None:
        path = self.last_saved
        self._bytes = path.stat().st_size if path.is_file() else 0
        rank_zero_info(f"{path}: {self._bytes / 1e6:.3g} MB ({why}, step {trainer.global_step})")


def _write_adapter(trainer: L.Trainer, checkpoint: Path) -> None:
    """Writes the adapter of a checkpoint, which holds it unsharded under every strategy."""
    stage = _stage_with_adapter(trainer)
    if stage is not None:
        saved = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
        state = {name.removeprefix("model."): value for name, value in saved.items()}  # names within VLMModule.model
        stage.export_adapter(_adapter_folder(checkpoint), state)


def _stage_with_adapter(trainer: L.Trainer) -> ExportsAdapter | None:
    module: object = trainer.lightning_module
    stage = cast(ExportsAdapter, module)
    return stage if hasattr(module, "export_adapter") and isinstance(stage.policy, PeftModel) else None


def _adapter_folder(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}_adapter")
