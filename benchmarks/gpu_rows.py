"""Results of ``gpu_grpo.py`` and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Side:
    """Results of one side (naive or ours) in one setting."""

    seconds: float | None
    """Median time of an update; None if it runs out of memory."""
    peak_gb: float | None
    """Peak of allocated memory, including weights."""
    gflop: float
    micro_batch: int


@dataclass(frozen=True)
class Row:
    """Results of both sides in one setting."""

    size: str
    checkpointing: bool
    completion: int
    group_size: int
    weights_gb: float
    naive: Side
    naive_at_once: Side
    ours: Side
    ours_no_cache: Side
    largest_logprob_difference: float
    """Between the two sides, in this precision."""

    @property
    def ratio(self) -> float | None:
        """Time of naive at its best micro-batch over ours."""
        return self.naive.seconds / self.ours.seconds if self.naive.seconds and self.ours.seconds else None

    @property
    def memory_ratio(self) -> float | None:
        """Memory of naive over ours, both with all completions at once."""
        both = self.naive_at_once.peak_gb, self.ours.peak_gb
        return both[0] / both[1] if both[0] and both[1] else None


def print_rows(found: Sequence[Row], rate: float) -> None:
    """Prints a line per setting; ``rate`` is in FLOP per second."""
    head = (
        "model",
        "ckpt",
        "C",
        "G",
        "naive s",
        "mb",
        "ours s",
        "ratio",
        "tok/s",
        "MFU naive",
        "MFU",
        "GB naive",
        "GB",
    )
    print("".join(f"{name:>11s}" for name in head))
    for row in found:
        ours, naive = row.ours, row.naive
        tokens = row.completion * row.group_size / ours.seconds if ours.seconds else None
        cells: list[Any] = [
            row.size,
            row.checkpointing,
            row.completion,
            row.group_size,
            naive.seconds,
            naive.micro_batch,
        ]
        cells += [ours.seconds, row.ratio, tokens, mfu(naive, rate), mfu(ours, rate)]
        cells += [row.naive_at_once.peak_gb, ours.peak_gb]
        print("".join(f"{_cell(cell):>11s}" for cell in cells), flush=True)


def mfu(side: Side, rate: float) -> float | None:
    """Returns the share of the measured rate of a matrix product; None if the side ran out of memory."""
    return side.gflop * 1e9 / side.seconds / rate if side.seconds else None


def _cell(value: Any) -> str:
    if value is None:
        return "no memory"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
