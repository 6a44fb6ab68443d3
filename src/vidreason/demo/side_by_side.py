"""Runs pipelines at the same time, each in a process of its own whose output goes to a file."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vidreason import exit_codes

_SHOWN = re.compile(r"\[\d+/\d+\] |error: ")
"""Lines of a pipeline that are shown besides being written to its file: where it is, and what went wrong."""
_ENDS = re.compile(rb"[\r\n]+")


@dataclass(frozen=True)
class Job:
    """One call of ``vidreason pipeline``."""

    name: str
    options: tuple[str, ...]
    log: Path
    """File that its output is appended to."""


RunJob = Callable[[Job], int]
"""Runs a job and returns its exit status."""


class Processes:
    """Runs jobs in processes of their own and passes a SIGTERM on to them.

    Args:
        show: Called with the lines that tell where a job is.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self.show = show
        self._running: set[subprocess.Popen[bytes]] = set()

    def __call__(self, job: Job) -> int:
        """Runs a job and returns its exit status."""
        started = time.monotonic()
        command = [sys.executable, "-m", "vidreason", "pipeline", *job.options]
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with (
            job.log.open("ab") as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process,
        ):
            self._running.add(process)
            assert process.stdout is not None
            line = b""
            while chunk := process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
                log.write(chunk)
                log.flush()
                *whole, line = _ENDS.split(line + chunk)
                for found in whole:
                    text = found.decode(errors="replace")
                    if _SHOWN.match(text):
                        self.show(f"{job.name:12} {text}")
            status = process.wait()
            self._running.discard(process)
        self.show(f"{job.name:12} {_ending(status)} after {(time.monotonic() - started) / 60:.1f} minutes")
        return status

    @contextmanager
    def passing_sigterm_on(self) -> Iterator[None]:
        """Passes a SIGTERM on in the block; the jobs write a checkpoint and end. Ctrl-C reaches them by itself."""

        def terminate(*_: object) -> None:
            for process in tuple(self._running):
                process.terminate()

        before = signal.signal(signal.SIGTERM, terminate)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def run_jobs(jobs: Sequence[Job], at_once: int, run: RunJob) -> Mapping[str, int]:
    """Runs jobs, several at the same time; one that fails does not stop the others.

    Args:
        jobs: The jobs, the longest first.
        at_once: Largest number of jobs that run at the same time.
        run: Runs one job.

    Returns:
        Exit status by name; after Ctrl-C also of jobs that did not begin.
    """
    with ThreadPoolExecutor(at_once) as pool:
        futures: dict[str, Future[int]] = {job.name: pool.submit(run, job) for job in jobs}
        while True:
            try:
                wait(futures.values())
                break
            except KeyboardInterrupt:  # the terminal sends it to the jobs as well, which end in order
                for future in futures.values():
                    future.cancel()
        return {
            name: exit_codes.INTERRUPTED if future.cancelled() else future.result() for name, future in futures.items()
        }


def _ending(status: int) -> str:
    if status == exit_codes.OK:
        return "finished"
    with suppress(ValueError):
        if status < 0:
            return f"ended by {signal.Signals(-status).name}"
    return "interrupted" if status == exit_codes.INTERRUPTED else f"stopped with exit status {status}"
