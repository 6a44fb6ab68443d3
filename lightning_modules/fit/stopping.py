"""Stops a fit at a safe point after Ctrl-C or SIGTERM, on all ranks together.

A rank that left alone would make the others wait for it in their next exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy, Strategy

from vidreason.signals import StopRequested, check_stop, defer_signals, stop_received

T = TypeVar("T")


def raise_if_any_rank_stopped(strategy: Strategy) -> None:
    """Stops all ranks if any of them received a signal; every rank has to call it.

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
    """Runs work that concerns this rank alone and may be interrupted by a signal.

    Args:
        strategy: The trainer's strategy.
        work: Called once; it may call ``check_stop``.
        default: Returned where several ranks run and this one was stopped: the caller goes on with it until
            :func:`raise_if_any_rank_stopped` stops all ranks.

    Raises:
        StopRequested: In a single process, or where no fit defers signals.
    """
    try:
        check_stop()
        return work()
    except StopRequested:
        # Without deferral nobody would ask later, so the exception has to pass.
        if not stop_received() or not isinstance(strategy, ParallelStrategy):
            raise
        return default


def stopped_consistently(trainer: L.Trainer, exception: BaseException) -> bool:
    """Returns whether a fit was stopped where its state is consistent on all ranks, so that it can be saved."""
    return isinstance(exception, StopRequested) and (trainer.world_size == 1 or exception.on_all_ranks)


class StopOnSignal(L.Callback):
    """Lets Ctrl-C and SIGTERM wait for the next point from which the fit can be resumed."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Defers signals from here on."""
        defer_signals(True)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops between two batches."""
        raise_if_any_rank_stopped(trainer.strategy)

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stops within a validation, which is repeated on resume; several ranks finish it first."""
        if trainer.world_size == 1:
            check_stop()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops before ranks gather their metrics."""
        raise_if_any_rank_stopped(trainer.strategy)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the deferral: what follows is the export, which is repeated if it is interrupted."""
        defer_signals(False)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Ends the deferral, so that a second signal ends the process at once."""
        defer_signals(False)
