"""Two processes that train together (gloo, on this machine), under a time limit: one that waits for the other fails."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, distributed, multiprocessing
from torch.distributed.tensor import DTensor


@pytest.fixture
def without_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A current folder of the test's own, no rank in the environment, and no process group left behind."""
    monkeypatch.chdir(tmp_path)
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def launch(script: str, *arguments: object, limit_s: float) -> None:
    """Runs ``script ARGUMENTS PORT`` in a process group of its own; fails the test where it fails or does not end."""
    status, said = finish(script, *arguments, limit_s=limit_s)
    assert status == 0, said[-6000:]


def finish(script: str, *arguments: object, limit_s: float) -> tuple[int, str]:
    """As ``launch``, but returns exit status and output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, script, *map(str, arguments), str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            pytest.fail(f"two ranks did not finish within {limit_s} s: one waits for the other")
    return process.returncode, said


def fork_two(target: Callable[..., None], arguments: tuple[Any, ...], port: str, machines: int = 1) -> None:
    """Calls ``target(rank, *arguments)`` in two forks with the environment of two ranks, then ends this process.

    With two ``machines`` each is alone on its own, and finds the first by its address.
    """
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(target, rank, arguments, port, machines), daemon=True) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


def _rank(target: Callable[..., None], rank: int, arguments: tuple[Any, ...], port: str, machines: int) -> None:
    local, node = (rank, 0) if machines == 1 else (0, rank)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(local), "NODE_RANK": str(node)}
    target(rank, *arguments)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
