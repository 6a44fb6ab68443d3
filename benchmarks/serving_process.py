"""A service in a process of its own, and what it uses: time, memory and descriptors."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")
_START_S = 1200.0
_PORT = re.compile(r"serving .* at http://.*:(\d+)")


class Reply(NamedTuple):
    """A response, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Served:
    """A running service."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    """File with what the service wrote to stderr."""
    temporary: Path
    """Folder in which the service keeps its temporary files."""

    def processes(self) -> list[int]:
        """Returns the ids of the service and of its helper processes."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        found = [int(pid) for file in children for pid in file.read_text().split()]
        return [self.process.pid, *found]

    def cpu_s(self) -> float:
        """Returns the CPU-seconds of all its processes so far."""
        ticks = 0
        for pid in self.processes():
            with suppress(FileNotFoundError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / _TICKS

    def memory_mb(self) -> float:
        """Returns the resident memory of all its processes in MB of 1e6 bytes."""
        total = 0
        for pid in self.processes():
            with suppress(FileNotFoundError):
                text = Path(f"/proc/{pid}/status").read_text()
                total += int(re.findall(r"VmRSS:\s+(\d+) kB", text)[0]) * 1024
        return total / 1e6

    def descriptors(self) -> int:
        """Returns the open descriptors of the service."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextmanager
def start(arguments: Sequence[str]) -> Iterator[Served]:
    """Starts ``vidreason serve`` on a free port, and ends it after the block.

    Raises:
        RuntimeError: If it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="served-") as folder:
        log, temporary = Path(folder, "log"), Path(folder, "tmp")
        temporary.mkdir()
        command = [sys.executable, "-m", "vidreason", "serve", *arguments, "--port", "0"]
        with log.open("wb") as stream:
            process = subprocess.Popen(command, stderr=stream, env={**os.environ, "TMPDIR": str(temporary)})
        try:
            yield Served(process, _port(process, log), log, temporary)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(120)


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    for _ in range(int(_START_S / 0.2)):
        found = _PORT.search(log.read_text(errors="replace"))
        if found is not None and _listens(int(found[1])):
            return int(found[1])
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
            break
    raise RuntimeError(f"the service did not start:\n{log.read_text(errors='replace')}")


def _listens(port: int) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 5):
        return True
    return False


def post(port: int, path: str, body: bytes | None, method: str = "POST", headers: Mapping[str, str] = {}) -> Reply:
    """Sends one request on a connection of its own."""
    connection = HTTPConnection("127.0.0.1", port, timeout=180)
    try:
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()
