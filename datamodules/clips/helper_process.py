"""Calls functions in a helper process, which is killed if a call takes too long or the run is stopped.

A decoder may spin in C, where no signal handler runs, or crash; reading from a pipe or a dead network mount blocks.
Only another process can be stopped in all these cases. Each thread that reads has one helper, also in the workers of a
DataLoader, which may not have children by ``multiprocessing``. A helper is a new interpreter and not a fork, so that
it inherits no lock and no thread pool; it starts in a third of a second, since it does not import torch.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, ClassVar, TypeVar

from vidreason import signals

T = TypeVar("T")
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import serve; serve(*sys.argv[2:])"
_START_TIMEOUT = 120.0  # seconds; a machine under load
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# Raised again by the caller; any other one ends the helper, as a crash does.
_ERRORS = (AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


class HelperError(RuntimeError):
    """Raised if a call has no result: its time is over, or the helper crashed."""


class TimeLimitError(HelperError):
    """Raised if a call takes too long; the helper was killed."""


class StoppedError(HelperError):
    """Raised if the run was stopped by a signal during the call."""


def call(function: Callable[..., T], *args: Any, timeout: float) -> T:
    """Calls a function in the helper process of this thread and returns its result.

    Args:
        function: A function of a module, which is imported in the helper; it should not import torch.
        args: Its arguments, which are pickled.
        timeout: Seconds that the call may take; the start of the helper does not count.

    Raises:
        TimeLimitError: If it takes longer.
        StoppedError: If the run is stopped by Ctrl-C or SIGTERM in the meantime.
        HelperError: If the helper crashes.
        Exception: That of the function.
    """
    if signals.stop_received() or signals.stop_pipe().poll():
        raise StoppedError("the run was stopped")
    helper = getattr(_of_thread, "helper", None)
    if helper is None or helper.owner != os.getpid() or not helper.alive:  # a fork has a copy of its parent's
        helper = _of_thread.helper = _Helper()
    return helper.call(function, args, timeout)


def limit_memory(size: int | None) -> None:
    """Sets the address space in bytes of helpers that start from now on; a call that needs more fails.

    Args:
        size: The limit; None sets none. Linux only.
    """
    _Helper.memory = size


def close() -> None:
    """Ends the helper process of this thread, if there is one."""
    helper = getattr(_of_thread, "helper", None)
    if helper is not None and helper.owner == os.getpid():
        helper.kill()
    _of_thread.helper = None


_of_thread = threading.local()


class _Helper:
    """A helper process, as the process that calls it sees it."""

    memory: ClassVar[int | None] = None
    """Address space in bytes of a helper that starts; None is no limit."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-c", _START.format(module=__name__)),
                    *(json.dumps(sys.path), str(theirs.fileno()), str(os.getpid()), str(self.memory or "")),
                ],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is for the run
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # readers share the CPUs
            )
        self.alive = True
        with self._killed_on_failure():
            self._wait(_START_TIMEOUT)
            self._receive()

    def call(self, function: Callable[..., T], args: tuple[Any, ...], timeout: float) -> T:
        with self._killed_on_failure():
            self._connection.send_bytes(pickle.dumps((function, args, os.getcwd())))
            self._wait(timeout)
            value, error = self._receive()
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    @contextmanager
    def _killed_on_failure(self) -> Iterator[None]:
        """Kills the process unless the block completes: a late answer would be taken for that of the next call."""
        complete = False
        try:
            yield
            complete = True
        finally:
            if not complete:
                self.kill()

    def kill(self) -> None:
        self.alive = False
        self._process.kill()
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):  # blocked in the kernel, by a dead network mount
            self._process.wait(1)

    def _wait(self, timeout: float) -> None:
        stop = signals.stop_pipe()
        ready = wait([self._connection, stop], timeout)
        if self._connection in ready:
            return
        if ready:
            raise StoppedError("the run was stopped")
        raise TimeLimitError(f"still not read after {timeout:g} seconds")

    def _receive(self) -> Any:
        try:
            head, sizes = pickle.loads(self._connection.recv_bytes())
            buffers = [bytearray(size) for size in sizes]
            for buffer in buffers:
                self._connection.recv_bytes_into(buffer)
            return pickle.loads(head, buffers=buffers)
        except (EOFError, ConnectionError) as error:
            raise HelperError(f"the decoder crashed ({self._exit()})") from error

    def _exit(self) -> str:
        status = self._process.wait()
        if status >= 0:
            return f"exit status {status}"
        name = signal.Signals(-status).name
        return f"{name}, perhaps out of memory" if name == "SIGKILL" else name


def serve(descriptor: str, parent: str, memory: str) -> None:
    """Answers the calls of the process that started this one, until that one ends.

    Args:
        descriptor: File descriptor of the connection.
        parent: Process id of the caller.
        memory: Address space in bytes; empty sets no limit.
    """
    _end_with(int(parent))
    if memory and sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from vidreason.datamodules.clips import measuring  # noqa: F401  # before the time of a call counts

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # FFmpeg writes there directly, into the progress bar of the run
    with Connection(int(descriptor)) as connection:
        _send(connection, None)
        while True:
            try:
                function, args, folder = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            _send(connection, _result(function, args, folder))


def _result(function: Callable[..., Any], args: tuple[Any, ...], folder: str) -> tuple[Any, Exception | None]:
    try:
        if os.getcwd() != folder:
            os.chdir(folder)
        return function(*args), None
    except _ERRORS as error:
        try:
            pickle.loads(pickle.dumps(error))
        except (TypeError, AttributeError, pickle.PicklingError):
            return None, RuntimeError(f"{type(error).__name__}: {error}")
        return None, error


def _send(connection: Connection, value: Any) -> None:
    """Sends a value; arrays are not copied into the pickle."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts = [buffer.raw() for buffer in buffers]
    connection.send_bytes(pickle.dumps((head, [part.nbytes for part in parts])))
    for part in parts:
        connection.send_bytes(part)


def _end_with(parent: int) -> None:
    """Makes the kernel kill this process when its parent ends, however that happens; Linux only."""
    if sys.platform != "linux":
        return  # there it ends at the next call
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
