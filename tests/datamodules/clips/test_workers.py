"""Workers of a DataLoader: no fork behind a started thread, and their end."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from vidreason.datamodules.clips.workers import ignore_signals_in_worker, worker_options


class Ancestry(Dataset[tuple[int, int, str]]):
    """Items tell the worker, its parent and what Linux says about the parent."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[int, int, str]:
        return os.getpid(), os.getppid(), Path(f"/proc/{os.getppid()}/status").read_text()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_workers_are_forks_of_a_process_with_one_thread() -> None:
    """Also where this process has several, as one that has trained has."""
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    options = {"batch_size": None, "collate_fn": tuple}
    told = list(DataLoader(Ancestry(), **options, **worker_options(2, (__name__,))))  # type: ignore[arg-type]
    stop.set()
    workers, parents = ({row[place] for row in told} for place in (0, 1))
    assert len(workers) == 2
    assert len(parents) == 1, "one server for all workers"
    assert os.getpid() not in workers | parents
    assert "\nThreads:\t1\n" in told[0][2]


def asleep(folder: Path, reader: int) -> None:
    ignore_signals_in_worker(0, reader=reader)
    (folder / "ready").touch()
    time.sleep(60)


def test_only_its_own_run_ends_a_worker(tmp_path: Path) -> None:
    """A scheduler's SIGTERM and a terminal's Ctrl-C go to workers too; the run's own SIGTERM must still end them."""
    context = multiprocessing.get_context("forkserver")
    worker = context.Process(target=asleep, args=(tmp_path, os.getpid()), daemon=True)
    worker.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    for name in ("TERM", "INT"):
        subprocess.run(["sh", "-c", f"kill -{name} {worker.pid}"], check=True)  # another process sends it
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
