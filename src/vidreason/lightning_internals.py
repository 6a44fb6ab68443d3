"""The private API of Lightning's trainer, loops, strategies and checkpoint callback, as of lightning 2.6.6.

A new version of Lightning has to be checked against this file, and against ``LightningCLI._run_subcommand``, which
``config/trainer_cli.py`` extends. ``tests/test_lightning_internals.py`` tests each attribute that
this file relies on.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.fabric.strategies.model_parallel import _load_raw_module_state
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

# ---------------------------------------------------------------------------------------------------- loop counters


def batches_done(trainer: L.Trainer) -> int:
    """Returns the number of batches that the fit has finished, over all epochs."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]


def batches_per_epoch(trainer: L.Trainer) -> int:
    """Returns the number of batches of an epoch; 2**53 if the loader has no length."""
    return int(min(trainer.num_training_batches, 2**53))


def between_steps(trainer: L.Trainer) -> bool:
    """Returns whether no gradient is left from the finished batches, so that the fit can be resumed behind them.

    In automatic optimisation with ``accumulate_grad_batches``, batches within a window leave one, which checkpoints do
    not store.
    """
    return batches_done(trainer) % batches_per_epoch(trainer) % trainer.accumulate_grad_batches == 0


def set_logged_steps(trainer: L.Trainer, steps: int) -> None:
    """Sets the step of the next log entry; after some restarts, Lightning's own counter is one too high."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = steps


def set_current_rate(scheduler: object) -> None:
    """Sets the rates of an optimizer to those that its schedule has at the current step.

    A restored optimizer has the rates of the schedule that it was saved with, which may have ended elsewhere.
    """
    if isinstance(scheduler, LambdaLR):
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        scheduler._last_lr = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate


def write_loop_state(
    loops: dict[str, Any], batches: int, per_epoch: int, validation_due: bool, logged_steps: int
) -> None:
    """Rewrites the state of the fit loop in a loaded checkpoint, in place, so that the fit continues after ``batches``.

    Lightning saves the counters of its loops as they are: in the middle of a batch, at the end of an epoch, or during
    a validation, and restarts differently from each. The counters written here are always those between two batches,
    or before a validation that is due.

    Args:
        loops: ``checkpoint["loops"]["fit_loop"]``.
        batches: Finished batches since the fit began.
        per_epoch: Batches per epoch.
        validation_due: Whether the validation after the last batch has yet to run.
        logged_steps: Number of steps as loggers count them.
    """
    epoch, batch = divmod(max(batches - 1, 0), per_epoch)
    in_epoch = min(batches, batch + 1)
    begun = int(batches > 0)
    loops["epoch_progress"] = _total_and_current(_counters(epoch + begun, processed=epoch, completed=epoch))
    # Lightning saves in hooks at the end of a batch, before it counts the batch as completed.
    open_batch = begun and not validation_due
    loops["epoch_loop.batch_progress"] = {
        "total": _counters(batches, completed=batches - open_batch),
        "current": _counters(in_epoch, completed=in_epoch - open_batch),
        "is_last_batch": begun == 1 and in_epoch == per_epoch,
    }
    begun_validation = int(validation_due)
    loops["epoch_loop.val_loop.batch_progress"] = {
        **_total_and_current(_counters(begun_validation, processed=0, completed=0)),
        "is_last_batch": False,
    }
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = logged_steps - begun


def _counters(ready: int, processed: int | None = None, completed: int | None = None) -> dict[str, int]:
    return {
        "ready": ready,
        "started": ready,
        "processed": ready if processed is None else processed,
        "completed": ready if completed is None else completed,
    }


def _total_and_current(counters: dict[str, int]) -> dict[str, Any]:
    return {"total": dict(counters), "current": dict(counters)}


# ---------------------------------------------------------------------------------------------------------- signals


class _ForwardSigterm(_SignalConnector):
    """Forwards SIGTERM to the ranks that this process launched.

    Lightning's own handler runs a collective operation, which may meet a different one on another rank and hang.
    """

    def _sigterm_notifier_fn(self, signum: int | signal.Signals, _: FrameType) -> None:
        launcher = self.trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signum)


def forward_sigterm(trainer: L.Trainer) -> None:
    """Makes a trainer forward SIGTERM to the ranks that it launched and do nothing else on it."""
    trainer._signal_connector = _ForwardSigterm(trainer)


# ------------------------------------------------------------------------------------------------------ checkpoints


class CheckpointWriter(ModelCheckpoint):
    """Lightning's checkpoint callback with public names for the private methods that a subclass needs."""

    def candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        """Returns the metrics by which a checkpoint written now would be ranked."""
        return self._monitor_candidates(trainer)

    def write_best(self, trainer: L.Trainer, metrics: Mapping[str, Tensor]) -> None:
        """Writes a checkpoint if its monitored metric is among the best so far."""
        self._save_topk_checkpoint(trainer, dict(metrics))

    def write_last(self, trainer: L.Trainer) -> None:
        """Writes ``last.ckpt``."""
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    @property
    def last_saved(self) -> Path:
        """Path of the checkpoint that was written last."""
        return Path(self._last_checkpoint_saved)

    def after_save(self, trainer: L.Trainer, path: Path) -> None:
        """Runs on every rank after a checkpoint was written; does nothing by default."""

    def after_remove(self, trainer: L.Trainer, path: Path) -> None:
        """Runs on every rank after a checkpoint was removed; does nothing by default."""

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        for logger in trainer.loggers:
            logger.save()  # A resumed fit does not log again what came before the checkpoint.
        super()._save_checkpoint(trainer, filepath)
        self.after_save(trainer, Path(filepath))

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        self.after_remove(trainer, Path(filepath))


# ------------------------------------------------------------------------------------------------------------ FSDP2


def load_unsharded_state(state: dict[str, Any], module: nn.Module, strict: bool) -> None:
    """Loads a full state dict into a module whose parameters may be sharded."""
    _load_raw_module_state(state, module, strict=strict)


def torch_optimizer(optimizer: Optimizer) -> Optimizer:
    """Returns the optimizer inside Lightning's wrapper."""
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def shard_over_all_processes(strategy: ModelParallelStrategy) -> None:
    """Sets the data-parallel size to the number of all processes; Lightning's ``auto`` is the number of nodes."""
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes
