"""Common parts of the GPU benchmarks: options, circumstances and a clock."""

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


def options_of(doc: str, arguments: Sequence[str] | None, minutes: float) -> argparse.Namespace:
    """Parses the options of all GPU benchmarks; without a GPU it exits unless ``--smoke`` is given."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that the figures are written to")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--minutes", type=float, default=minutes, help="nothing is begun after them")
    options = parser.parse_args(arguments)
    if not options.smoke and not torch.cuda.is_available():
        parser.error("no GPU here; --smoke runs the same code on a CPU")
    return options


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
