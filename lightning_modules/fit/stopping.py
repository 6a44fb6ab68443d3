"""Stops a fit after Ctrl-C or SIGTERM at a point from which it can be resumed, on all ranks together.

If one rank stopped alone, the others would wait for it in their next collective operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy, Strategy

from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_internals import between_steps
from vidreason.signals import StopNow, StopRequested, check_stop, defer_signals, stop_received

T = TypeVar("T")


def raise_if_any_rank_stopped(strategy: Strategy) -> None:
    """Stops all ranks if any rank has received a signal; every rank has to call it.

    Raises:
        StopRequested: On every rank.
    """
    stopped = stop_received()
    if isinstance(strategy, ParallelStrategy):
        number = torch.tensor(float(stopped), device=strategy.root_device)
        stopped = bool(strategy.reduce(number, reduce_op="sum") > 0)
    if stopped:
        raise StopRequested(on_all_ranks=True)


def run_unless_stopped(strategy: Strategy, work: Callable[[], T], default: T) -> T:
    """Runs work without collective operations, which a signal may interrupt on this rank.

    Args:
        strategy: The trainer's strategy.
        work: Called once; it may call ``check_stop``.
        default: Result if this rank of several was stopped; the caller continues with it until
            :func:`raise_if_any_rank_stopped` stops all ranks.

    Raises:
        StopRequested: In a single process, or if signals are not deferred.
    """
    try:
        check_stop()
        return work()
    except StopRequested:
        # Without deferral, no later call would raise again, so the exception has to pass.
        if not stop_received() or not isinstance(strategy, ParallelStrategy):
            raise
        return default


def stopped_consistently(trainer: L.Trainer, exception: BaseException) -> bool:
    """Returns whether a signal stopped the fit with the same state on all ranks, so that it can be saved."""
    return isinstance(exception, StopRequested) and (trainer.world_size == 1 or exception.on_all_ranks)


class StopOnSignal(L.Callback):
    """Defers Ctrl-C and SIGTERM to the next point from which the fit can be resumed."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Defers signals from here on."""
        defer_signals(True)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops between two optimizer steps.

        Raises:
            StopRequested: If a signal was received.
            StopNow: If its clips were not read because of the signal, but gradients of earlier batches are left; a
                checkpoint that is written here could not be resumed.
        """
        if between_steps(trainer):
            raise_if_any_rank_stopped(trainer.strategy)
        if isinstance(batch, VideoBatch) and any(failed.stopped for failed in batch.failed):
            raise StopNow

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stops within a validation, which a resumed fit repeats; several ranks finish the validation first."""
        if trainer.world_size == 1:
            check_stop()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops before ranks gather their metrics."""
        raise_if_any_rank_stopped(trainer.strategy)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the deferral before the export, which is repeated if it is interrupted."""
        defer_signals(False)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Ends the deferral, so that a second signal ends the process at once."""
        defer_signals(False)
