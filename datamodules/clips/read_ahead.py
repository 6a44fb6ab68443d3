"""Reads ahead: threads read the next clips, each in a helper process of its own, while the model decides."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from functools import partial
from itertools import islice
from queue import SimpleQueue
from typing import TypeVar

from vidreason.datamodules.clips import helper_process
from vidreason.signals import stop_pipe

T = TypeVar("T")
R = TypeVar("R")
_MOST_READERS = 8


def usual_readers() -> int:
    """Returns the number of clips that are read at once by default: one for each CPU of this process, at most 8."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # of torchrun; they share the CPUs
    return max(1, min(_MOST_READERS, cpus // ranks))


class Readers:
    """Threads that read, kept with their helper processes until the object is gone.

    Args:
        number: Number of threads; 0 reads each item when it is asked for, in the thread that asks.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._started = False

    def ahead(self, items: Iterable[T], read: Callable[[T], R], ahead: int) -> Generator[R, None, None]:
        """Yields ``read(item)`` of each item in order.

        Args:
            items: Items, which are asked for as they are needed, in the thread that asks.
            read: Reads one item; several threads call it, and it waits for a helper process, not for the interpreter.
            ahead: Items that are being read or wait, beside the one that is yielded.

        Raises:
            Exception: That of ``read``, at its item.
        """
        if not self._number:
            yield from map(read, items)
            return
        self._start()
        stop_pipe()  # opened here, once: a helper that waits in a thread waits for a signal to the run, too
        source, waiting = iter(items), deque[Future[R]]()
        try:
            while True:
                for item in islice(source, ahead + 1 - len(waiting)):
                    waiting.append(Future())
                    self._jobs.put(partial(_run, waiting[-1], read, item))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _start(self) -> None:
        if self._started:
            return
        self._started = True
        for _ in range(self._number):
            # Daemons: a process that ends does not wait for a clip. The kernel ends a helper with its thread.
            threading.Thread(target=_serve, args=(self._jobs,), daemon=True).start()
        weakref.finalize(self, _stop, self._jobs, self._number)


def _run(future: Future[R], read: Callable[[T], R], item: T) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(read(item))
        except BaseException as error:  # raised again where the item is asked for
            future.set_exception(error)


def _serve(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    try:
        while (job := jobs.get()) is not None:
            job()
            del job  # with what was read
    finally:
        helper_process.close()


def _stop(jobs: SimpleQueue[Callable[[], None] | None], threads: int) -> None:
    for _ in range(threads):
        jobs.put(None)
