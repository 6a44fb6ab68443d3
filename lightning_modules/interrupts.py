"""Ctrl-C and SIGTERM: a fit is stopped only where its state is whole, everything else at once.

A signal's handler may run in the middle of an optimizer step. While a fit defers signals it only takes note, and the
places where nothing is half done ask: between batches, between the tokens of a rollout, between the updates on it.
Several ranks have to leave together, for each of them would wait for the others in the next exchange.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

T = TypeVar("T")

_PATIENCE_S = 1.0
"""Signals that come within this time are one: a terminal and a launcher may both send it"""


class StopRequested(KeyboardInterrupt):
    """The user (Ctrl-C) or the system (SIGTERM) ends the run; raised where its state is whole.

    Args:
        why: The signal.
        together: Whether all ranks raise it at the same place.
    """

    def __init__(self, why: str = "", together: bool = False) -> None:
        super().__init__(why)
        self.together = together


class StopNow(KeyboardInterrupt):
    """Ctrl-C for the second time: nothing more is written."""


def left_whole(trainer: L.Trainer, exception: BaseException) -> bool:
    """Whether a fit was stopped where its state is whole, on all ranks, so that they can save it together."""
    return isinstance(exception, StopRequested) and (trainer.world_size == 1 or exception.together)


class _Asked:
    """What signals have said to this process."""

    deferring = False
    since: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal.

        Raises:
            StopRequested: Nothing defers it.
            StopNow: Ctrl-C for the second time: at once, without a checkpoint.
        """
        if not self.deferring:
            raise StopRequested(signal.Signals(number).name)
        if self.since is None:
            self.since = time.monotonic()
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print("stopping; a checkpoint is written (Ctrl-C again: without one)", file=sys.stderr, flush=True)
        elif number == signal.SIGINT and time.monotonic() - self.since > _PATIENCE_S:
            raise StopNow


_asked = _Asked()


@contextmanager
def signals_handled() -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C raise :class:`StopRequested`, at once or where a fit defers it; then all is as before.

    Only a main thread can handle signals; a process that ignores Ctrl-C (in the background of a script) goes on so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _asked)
    try:
        yield
    finally:
        _asked.deferring, _asked.since = False, None
        for number, handler in before.items():
            signal.signal(number, handler)


def defer(deferring: bool) -> None:
    """Says whether signals wait until somebody asks."""
    _asked.deferring = deferring


def check_stop() -> None:
    """Raises what a signal has asked for; this process alone, so call it where no rank waits for another.

    Raises:
        StopRequested: A signal has come.
    """
    if _asked.since is not None:
        raise StopRequested


def stop_together(strategy: Strategy) -> None:
    """Stops all ranks where a signal has come to one of them; all have to call it.

    Raises:
        StopRequested: On every rank.
    """
    asked = _asked.since is not None
    if isinstance(strategy, ParallelStrategy):
        number = torch.tensor(float(asked), device=strategy.root_device)
        asked = bool(strategy.reduce(number, reduce_op="sum") > 0)
    if asked:
        raise StopRequested(together=True)


def unless_stopped(strategy: Strategy, work: Callable[[], T], nothing: T) -> T:
    """Does some work of this rank alone; where a signal comes, several ranks go on with ``nothing`` until all stop.

    Args:
        strategy: The trainer's.
        work: May ask :func:`check_stop` on its way.
        nothing: What it returns where it was left; ``stop_together`` has to follow.

    Raises:
        StopRequested: In a single process, and where no fit defers signals.
    """
    try:
        check_stop()
        return work()
    except StopRequested:
        if _asked.since is None or not isinstance(strategy, ParallelStrategy):
            raise  # nothing defers signals, so nobody would ask later
        return nothing


class LaunchedRanksToldToo(_SignalConnector):
    """Passes SIGTERM on to the ranks that this process has started.

    Lightning's own handler exchanges tensors with other ranks in the midst of whatever they exchange already.
    """

    def _sigterm_notifier_fn(self, signum: int | signal.Signals, _: FrameType) -> None:
        launcher = self.trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signum)


def take_signals(trainer: L.Trainer) -> None:
    """Lets a trainer handle signals by this module."""
    trainer._signal_connector = LaunchedRanksToldToo(trainer)
