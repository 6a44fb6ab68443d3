"""Ctrl-C and SIGTERM as one exception, raised immediately or at the next safe point of a fit.

A signal handler may run in the middle of an optimizer step. While a fit defers signals, the handler only records them,
and code checks for them where the state is consistent: between batches, and between the tokens of a rollout.
``lightning_modules/fit/stopping.py`` coordinates several ranks. Standard library only.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import FrameType

_SAME_REQUEST_S = 1.0
"""Signals within this time count as one request: a terminal and a launcher may both send it."""


class StopRequested(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the run at a point where its state is consistent.

    Args:
        why: Name of the signal.
        on_all_ranks: Whether every rank raises it at the same place, so that all of them can save together.
    """

    def __init__(self, why: str = "", on_all_ranks: bool = False) -> None:
        super().__init__(why)
        self.on_all_ranks = on_all_ranks


class StopNow(KeyboardInterrupt):
    """A second Ctrl-C, after which the run ends without writing anything."""


class _SignalHandler:
    """Records the signals that this process receives."""

    deferring = False
    received_at: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handles one signal.

        Raises:
            StopRequested: If signals are not deferred.
            StopNow: If this is a second Ctrl-C.
        """
        _pipe.announce()
        if not self.deferring:
            raise StopRequested(signal.Signals(number).name)
        if self.received_at is None:
            self.received_at = time.monotonic()
            # one message per machine, not one per process
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print("stopping; a checkpoint is written (Ctrl-C again: without one)", file=sys.stderr, flush=True)
        elif number == signal.SIGINT and time.monotonic() - self.received_at > _SAME_REQUEST_S:
            raise StopNow


class _StopPipe:
    """A pipe that becomes readable when a signal is received, here and in the workers that have its reading end."""

    reader: Connection | None = None
    writer: Connection | None = None
    announced = False

    def open(self) -> Connection:
        if self.reader is None:
            self.reader, self.writer = Pipe(duplex=False)
        return self.reader

    def announce(self) -> None:
        if self.writer is not None and not self.announced:
            self.announced = True
            self.writer.send_bytes(b"stop")

    def renew(self) -> None:
        """Forgets a signal that was announced; what still reads the old pipe stays stopped."""
        if self.announced:
            self.reader, self.writer, self.announced = None, None, False

    def take(self, reader: Connection) -> None:
        self.reader, self.writer, self.announced = reader, None, False


_handler = _SignalHandler()
_pipe = _StopPipe()


def stop_pipe() -> Connection:
    """Returns a connection that becomes readable when this run receives a signal; nothing is ever read from it.

    Something that waits, such as for the file of a clip, waits for it too.
    """
    return _pipe.open()


def use_stop_pipe(pipe: Connection) -> None:
    """Sets :func:`stop_pipe` in a worker process to that of its run, which receives the signals."""
    _pipe.take(pipe)


@contextmanager
def handle_signals() -> Iterator[None]:
    """Turns SIGTERM and Ctrl-C into :class:`StopRequested` within the block, then restores the earlier handlers.

    Outside of the main thread it does nothing, because Python allows handlers there only. A process that ignores
    Ctrl-C (one that a script started in the background) keeps ignoring it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _handler)
    try:
        yield
    finally:
        _handler.deferring, _handler.received_at = False, None
        _pipe.renew()
        for number, handler in before.items():
            signal.signal(number, handler)


def defer_signals(deferring: bool) -> None:
    """Sets whether signals wait for the next :func:`check_stop` (True) or raise immediately (False)."""
    _handler.deferring = deferring


def stop_received() -> bool:
    """Returns whether this process has received a signal while signals were deferred."""
    return _handler.received_at is not None


def check_stop() -> None:
    """Stops if a deferred signal was received; call it only where no other rank waits for this one.

    Raises:
        StopRequested: If a signal was received.
    """
    if stop_received():
        raise StopRequested
