"""How long a pipeline will still take, as far as an earlier run of the same folder tells."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Behind:
    """The stages that follow the one that runs."""

    seconds: float
    """What those took whose length is known"""
    complete: bool
    """All of them are known; False makes every sum a lower bound"""

    def __add__(self, other: Behind) -> Behind:
        return Behind(self.seconds + other.seconds, self.complete and other.complete)


BEHIND: ContextVar[Behind | None] = ContextVar("BEHIND", default=None)
"""Set while a pipeline runs a stage; None where a stage runs by itself"""


def pipeline_left(stage_seconds: float, behind: Behind) -> str:
    """Says how long the whole pipeline will take.

    Args:
        stage_seconds: What is left of the stage that runs.
        behind: What follows.

    >>> pipeline_left(30, Behind(600, complete=True)), pipeline_left(10, Behind(0, complete=False))
    ('about 10 min', 'at least 10 s')
    """
    seconds = stage_seconds + behind.seconds
    if seconds < 90:
        number = f"{seconds:.0f} s"
    elif seconds < 5400:
        number = f"{seconds / 60:.0f} min"
    else:
        number = f"{seconds / 3600:.1f} h"
    return f"{'about' if behind.complete else 'at least'} {number}"
