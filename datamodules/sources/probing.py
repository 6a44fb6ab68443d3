"""Probes clips before a data set is made, several at a time and each within a time limit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.datamodules.clips.measuring import ClipProbe, measure_clip
from vidreason.datamodules.clips.sampling import Stretch
from vidreason.datamodules.clips.time_limit import call_reader

T = TypeVar("T")


@dataclass(frozen=True)
class Unreadable:
    """The reason why a clip cannot be used."""

    reason: str


def probe_clips(
    clips: Sequence[tuple[Path, Stretch | None]], workers: int, timeout: float
) -> Iterator[ClipProbe | Unreadable]:
    """Measures clips in parallel; a clip that hangs or crashes its process does not stop the others.

    Args:
        clips: Path, and the part of the video if it is not all of it.
        workers: Number of processes.
        timeout: Seconds after which the process of a clip is killed.

    Yields:
        One result per clip, in order.
    """
    return map_clips(lambda path, stretch: call_reader(measure_clip, path, stretch, timeout=timeout), clips, workers)


def map_clips(
    read: Callable[[Path, Stretch | None], T], clips: Sequence[tuple[Path, Stretch | None]], workers: int
) -> Iterator[T | Unreadable]:
    """Calls a function for each clip in parallel threads, each of which has a helper process.

    Args:
        read: Opens the clip by ``call_reader``, so that it may hang or crash.
        clips: Path, and the part of the video if it is not all of it.
        workers: Number of threads.

    Yields:
        One result per clip, in order.
    """
    with ThreadPoolExecutor(max(1, min(workers, len(clips)))) as pool:
        results = [pool.submit(_result, read, path, stretch) for path, stretch in clips]
        try:
            for result in results:
                yield result.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _result(read: Callable[[Path, Stretch | None], T], path: Path, stretch: Stretch | None) -> T | Unreadable:
    try:
        return read(path, stretch)
    except DecodeError as error:
        return Unreadable(_reason(str(error).removeprefix(f"{path}: ")))
    except OSError as error:
        return Unreadable(error.strerror or str(error))
    except RuntimeError as error:
        return Unreadable(" ".join(str(error).split()) or type(error).__name__)


def _reason(message: str) -> str:
    """Returns the last reader's error without numbers and paths; the first reader's is a C++ stack trace."""
    last = message.partition("; decord: ")[0]
    return re.sub(r"\[Errno -?\d+\] |: '/.*'$", "", last)
