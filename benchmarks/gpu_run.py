"""Common parts of the GPU benchmarks: options, circumstances, a time limit and a clock."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from figures import versions


def options_of(doc: str, arguments: Sequence[str] | None, minutes: float, parts: Sequence[str]) -> argparse.Namespace:
    """Parses the options; without a GPU it exits unless ``--tiny`` is given."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that the figures are written to")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--minutes", type=float, default=minutes, help="nothing is begun after them")
    parser.add_argument("--parts", nargs="+", choices=tuple(parts), default=tuple(parts))
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no GPU here; --tiny runs the same code on a CPU")
    return options


class Deadline:
    """The time limit of a script.

    Args:
        minutes: Minutes after which nothing is begun.

    Attributes:
        left_out: What was not begun.
    """

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.left_out: list[str] = []

    def allows(self, name: str) -> bool:
        """Returns whether there is time to begin something; notes it if not."""
        if time.monotonic() < self.end:
            return True
        self.left_out.append(name)
        return False


def circumstances(clock: Clock, packages: Sequence[str]) -> dict[str, Any]:
    """Returns date, device and versions."""
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if clock.cuda else f"CPU {platform.machine()}",
        "versions": versions(packages),
        "cuda": torch.version.cuda,
    }


class Clock:
    """Measures time and memory on the device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.cuda = device == "cuda"

    def run(self, step: Callable[[], None], repeats: int) -> tuple[list[float], float] | None:
        """Returns (seconds of each repeat, peak in GB of 1e9 bytes), or None if memory runs out."""
        seconds = []
        try:
            if self.cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            for _ in range(repeats):
                seconds.append(self._one(step))
        except torch.OutOfMemoryError:
            return None
        return seconds, torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0

    def _one(self, step: Callable[[], None]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        # kernels run asynchronously, so the device has to record the times
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1e3


def matmul_rate(size: int, dtype: torch.dtype, device: str) -> float:
    """Returns the rate of a square matrix product in FLOP per second."""
    a = torch.randn(size, size, device=device, dtype=dtype)

    def ten() -> None:
        for _ in range(10):
            a @ a

    found = Clock(device).run(ten, 6)
    assert found is not None
    return 10 * 2 * size**3 / statistics.median(found[0][1:])
