"""Worker processes of a DataLoader: how they start, and how they end with the process that reads from them.

A fork of a process whose threads have started (torch's, OpenBLAS's) may inherit a lock that nobody releases, and torch
2.15 ends such forks at random ("Invalid thread pool"). Workers are therefore forks of a server process with one
thread, which imports the modules that they need once: seconds for the first loader of a process, nothing for others.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from vidreason.signals import stop_pipe, use_stop_pipe

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def worker_options(number: int, modules: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the arguments of a DataLoader that concern its workers, and starts their server process.

    Args:
        number: Number of workers; 0 reads in this process.
        modules: Modules that workers need, which the server imports once.
    """
    if not number:
        return {"num_workers": 0}
    context = multiprocessing.get_context("forkserver")
    # Neither has an effect on a server that runs already.
    context.set_forkserver_preload([*dict.fromkeys(("vidreason.datamodules.base", *modules))])
    # Python 3.11 does not hand the paths of modules on.
    with _environment({**_ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}):
        forkserver.ensure_running()
    return {
        "num_workers": number,
        "multiprocessing_context": context,
        "persistent_workers": True,
        "worker_init_fn": partial(ignore_signals_in_worker, stop=stop_pipe(), reader=os.getpid()),
    }


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def ignore_signals_in_worker(worker: int, stop: Connection | None = None, reader: int | None = None) -> None:
    """Makes a worker ignore Ctrl-C and SIGTERM to the process group, so that only its reader ends it.

    Args:
        worker: Number of the worker, which a ``worker_init_fn`` receives.
        stop: ``signals.stop_pipe()`` of the reader, which ends a read when the reader receives a signal.
        reader: Process id of the process that reads from the worker; None is the parent.
    """
    if stop is not None:
        use_stop_pipe(stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        # a blocked signal is only delivered to sigwaitinfo, which tells who sent it
        threading.Thread(target=_exit_on_sigterm_of, args=(reader or os.getppid(),), daemon=True).start()


def _exit_on_sigterm_of(reader: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != reader:
        pass
    os._exit(0)
