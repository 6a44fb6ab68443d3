"""Real processes that run ``vidreason`` commands and are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

POLL_S = 0.0005


class Ended(NamedTuple):
    """How an attempt ended."""

    killed: bool
    status: int
    """Exit status; -9 where it was killed"""
    seconds: float
    stopping: float
    """Seconds from the signal to the end"""


def attempt(
    argv: Sequence[str],
    folder: Path,
    log: Path,
    kill: Callable[[float], bool] | None,
    number: signal.Signals,
    limit_s: float,
) -> Ended:
    """Runs ``vidreason ARGV`` in ``folder`` as a process of its own.

    Args:
        argv: Arguments behind ``vidreason``.
        folder: Its working directory.
        log: Where its output is appended.
        kill: Is asked with the seconds since the start, all the time; True sends the process and all it has started a
            signal, once.
        number: Which signal.
        limit_s: Seconds after which it counts as hanging.

    Raises:
        TimeoutError: It hangs.
    """
    start = time.monotonic()
    pid = _spawn(argv, folder, log)
    killed_at: float | None = None
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        seconds = time.monotonic() - start
        if found:
            exit_status = os.waitstatus_to_exitcode(status)
            killed = killed_at is not None and exit_status != 0
            return Ended(killed, exit_status, killed_at or seconds, seconds - (killed_at or seconds))
        if killed_at is None and kill is not None and kill(seconds):
            with suppress(ProcessLookupError, PermissionError):  # its first moment: no session of its own yet
                os.killpg(pid, number)
                killed_at = seconds
        if seconds > limit_s:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"vidreason {' '.join(argv)}: has not ended after {limit_s:.0f} s, see {log}")
        time.sleep(POLL_S)


def _spawn(argv: Sequence[str], folder: Path, log: Path) -> int:
    with log.open("ab") as out:
        command = [sys.executable, "-m", "vidreason", *argv]
        return subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, start_new_session=True).pid


def drafts(run: Path) -> bool:
    """Whether something is just being written into a run folder: a checkpoint, an adapter, a table."""
    for folder, _, files in os.walk(run):
        if folder.endswith(".part") or any(name.startswith(".") and name[1:2].isdigit() for name in files):
            return True
    return False
