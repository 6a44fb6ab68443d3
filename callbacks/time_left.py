"""How long a pipeline will still take: from an earlier run of the folder, else from what its stages have to do.

The time of a stage that was never run is its :class:`~vidreason.lightning_modules.work.Work` times the speed of this
machine, which is taken from the stages that did run here and from the one that runs. The less has run, the rougher it
is: an estimate is called "roughly", a sum of times that were taken "about", and one that lacks a stage "at least".
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, replace

import numpy as np

from vidreason.lightning_modules.work import Work

_VARIABLE = "VIDREASON_BEHIND"
_SHAPE = Work(clips_read=1, clips_learnt=1, texts_scored=0.15, texts_learnt=0.5, texts_written=0.5)
"""What each kind of work is taken to cost, in clips read, until stages tell: a guess that suits the embedded model"""
_TRUST = 0.02
"""Weight of ``_SHAPE`` beside all measured stages together"""


@dataclass(frozen=True)
class Behind:
    """The stages that follow the one that runs, and what is known of this machine's speed."""

    seconds: float = 0.0
    """What those took whose length is known"""
    complete: bool = True
    """Every stage is in ``seconds`` or in ``untimed``; False makes every sum a lower bound"""
    untimed: tuple[Work, ...] = ()
    """What those have to do that were never run"""
    timed: tuple[tuple[Work, float], ...] = ()
    """Stages that did run here: what they did, and their seconds"""
    running: Work | None = None
    """What the stage that runs has to do in all"""
    began: float = field(default=0.0, compare=False)
    """When it began, in seconds since the epoch"""

    def __add__(self, other: Behind) -> Behind:
        return Behind(
            self.seconds + other.seconds,
            self.complete and other.complete,
            self.untimed + other.untimed,
            self.timed + other.timed,
            self.running or other.running,
            max(self.began, other.began),
        )


@contextmanager
def announced(behind: Behind) -> Iterator[None]:
    """Lets a stage know what is behind it, also one that is a process of its own."""
    os.environ[_VARIABLE] = json.dumps(asdict(replace(behind, began=time.time())))
    try:
        yield
    finally:
        del os.environ[_VARIABLE]


def what_is_behind() -> Behind | None:
    """Returns what a pipeline announced; None where a stage runs by itself."""
    text = os.environ.get(_VARIABLE)
    if text is None:
        return None
    found = json.loads(text)
    running = found["running"]
    return Behind(
        seconds=found["seconds"],
        complete=found["complete"],
        untimed=tuple(Work(**work) for work in found["untimed"]),
        timed=tuple((Work(**work), seconds) for work, seconds in found["timed"]),
        running=None if running is None else Work(**running),
        began=found["began"],
    )


def speeds(timed: Sequence[tuple[Work, float]]) -> Work:
    """Estimates the seconds of one unit of each kind of work.

    Least squares over the relative errors of the stages, each weighted by its share of the time, with the typical
    proportions as a ridge; never below a tenth of these.

    Args:
        timed: At least one stage with its seconds, which are positive.
    """
    shape = np.array(astuple(_SHAPE))
    done = np.array([astuple(work) for work, _ in timed])
    seconds = np.array([s for _, s in timed])
    scale = seconds.sum() / (done @ shape).sum()
    weights = np.sqrt(seconds / seconds.sum())
    rows = done * shape * scale / seconds[:, None] * weights[:, None]
    ridge = np.sqrt(_TRUST) * np.eye(len(shape))
    wanted = np.concatenate([weights, np.diag(ridge)])
    factors, *_ = np.linalg.lstsq(np.concatenate([rows, ridge]), wanted, rcond=None)
    return Work(*(np.maximum(factors, 0.1) * shape * scale).tolist())


def pipeline_left(behind: Behind, stage_left: float = 0.0, stage_seconds: float | None = None) -> str:
    """Says how long the whole pipeline will take.

    Args:
        behind: What follows.
        stage_left: Seconds that are left of the stage that runs.
        stage_seconds: Seconds that it will have taken in all, where that can be told.

    >>> pipeline_left(Behind(600), 30), pipeline_left(Behind(complete=False), 10)
    ('about 10 min', 'at least 10 s')
    >>> pipeline_left(Behind(untimed=(Work(clips_read=200),), running=Work(clips_read=100)), 10, 50)
    'roughly 2 min'
    """
    seconds, word = stage_left + behind.seconds, "about"
    timed = behind.timed
    if behind.running is not None and stage_seconds:
        timed = (*timed, (behind.running, stage_seconds))
    timed = tuple((work, taken) for work, taken in timed if taken > 0 and any(astuple(work)))
    if behind.untimed and timed:
        costs, word = astuple(speeds(timed)), "roughly"
        seconds += float(np.dot(costs, np.sum([astuple(work) for work in behind.untimed], axis=0)))
    if not behind.complete or (behind.untimed and not timed):
        word = "at least"
    return f"{word} {_duration(seconds)}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
