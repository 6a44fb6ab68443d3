"""When a fit writes checkpoints: every so many batches, after a validation, at an epoch's end, and where it stops.

Always between two batches, after the validation and the logging of the first: GRPO makes several optimizer steps on a
batch, so a count of steps (Lightning's ``every_n_train_steps``) would not fit, and within a batch there is no state to
resume from.
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

from vidreason.lightning_modules.fit.lightning_internals import CheckpointWriter, batches_done, batches_per_epoch
from vidreason.lightning_modules.fit.skip_unreadable import TooManyUnreadableError
from vidreason.lightning_modules.fit.stopping import stopped_consistently
from vidreason.lightning_modules.vlms.loading.weight_folders import read_info
from vidreason.lightning_modules.weights.lineage import Lineage
from vidreason.signals import StopNow


@dataclass(frozen=True)
class CheckpointOptions:
    """Which checkpoints a fit leaves in ``RUN/checkpoints``, beside ``last.ckpt``.

    Args:
        every_n_batches: Batches between two checkpoints; one also follows every validation and every epoch.
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


class ExportsAdapter(Protocol):
    """What :class:`RunCheckpoint` asks of a stage to write its adapter beside a checkpoint."""

    policy: nn.Module

    def lineage(self, folder: Path) -> Lineage:
        """Returns where the weights in ``folder`` come from."""
        ...

    def export_adapter(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes the trained adapter, with the weights ``state`` by the model's own names, into ``folder``."""
        ...


class RunCheckpoint(CheckpointWriter):
    """Writes ``last.ckpt`` and the best checkpoints, each with its adapter in a folder beside it (``last_adapter/``).

    Args:
        options: When, and by which metric.
        dirpath: Where to; null is ``checkpoints`` in the run folder.
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
        """Forgets an earlier fit of this process."""
        self._adapter_checked = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts counting from where the fit stands: a resumed fit has just been saved."""
        super().on_train_start(trainer, pl_module)
        self._saved_at, self._validated, self._within_batch = batches_done(trainer), {}, False
        self._restore_adapter_folder(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves if it is time, before the batch is trained on."""
        done = batches_done(trainer)
        in_epoch = done % batches_per_epoch(trainer)
        between_steps = in_epoch % trainer.accumulate_grad_batches == 0
        due = done - self._saved_at >= self.options.every_n_batches or in_epoch == 0
        if between_steps and (self._validated or (due and done > self._saved_at)):
            self._save(trainer)
        self._within_batch = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Marks the batch as finished; the checkpoint waits for the validation and the logging behind it."""
        self._within_batch = False

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Does nothing: the checkpoint of an epoch is written before the next batch, or at the end."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remembers the metrics by which the next checkpoint, which follows at once, is judged."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._validated = self.candidates(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the end of the fit, after the stage's weights were exported."""
        if self._validated or batches_done(trainer) > self._saved_at:
            self._save(trainer)
            self._report(trainer, "end of training")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Covers a resumed fit that was already at its end and did not begin to train."""
        self._restore_adapter_folder(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Saves where the fit stops in a state that can be resumed; several ranks only where all stop together."""
        if isinstance(exception, StopNow):
            return
        together = stopped_consistently(trainer, exception) or isinstance(exception, TooManyUnreadableError)
        alone = trainer.world_size == 1 and not isinstance(exception, OSError)
        started = trainer.global_step > 0 and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if started and (together or (alone and not self._within_batch)):
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
        """Writes the adapter of the restored checkpoint if a kill came between the two."""
        path, checked = trainer.ckpt_path, self._adapter_checked
        self._adapter_checked = True
        if checked or not path or not trainer.is_global_zero or self.dirpath is None:
            return
        path, stage = Path(path), _stage_with_adapter(trainer)
        if stage is None or path.resolve().parent != Path(self.dirpath).resolve():
            return
        folder = _adapter_folder(path)
        if read_info(folder) != json.loads(json.dumps(stage.lineage(folder).info())):
            _write_adapter(trainer, path)
            rank_zero_info(f"{folder}: written again, a kill had come before it (step {trainer.global_step})")

    def _report(self, trainer: L.Trainer, why: str) -> None:
        path = self.last_saved
        self._bytes = path.stat().st_size if path.is_file() else 0
        rank_zero_info(f"{path}: {self._bytes / 1e6:.3g} MB ({why}, step {trainer.global_step})")


def _write_adapter(trainer: L.Trainer, checkpoint: Path) -> None:
    """Writes the adapter that a checkpoint holds, which is whole there whatever the strategy."""
    stage = _stage_with_adapter(trainer)
    if stage is not None:
        saved = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
        state = {name.removeprefix("model."): value for name, value in saved.items()}
        stage.export_adapter(_adapter_folder(checkpoint), state)


def _stage_with_adapter(trainer: L.Trainer) -> ExportsAdapter | None:
    module: object = trainer.lightning_module
    stage = cast(ExportsAdapter, module)
    return stage if hasattr(module, "export_adapter") and isinstance(stage.policy, PeftModel) else None


def _adapter_folder(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}_adapter")
