"""Probes clips before a data set is made, several at a time and each within a time limit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.datamodules.clips.measuring import measure_clip
from vidreason.datamodules.clips.reading import call_reader
from vidreason.datamodules.clips.sampling import Stretch

T = TypeVar("T")


@dataclass(frozen=True)
class Unreadable:
    """Why a clip cannot be used."""

    reason: str


def probe_clips(
    clips: Sequence[tuple[Path, Stretch | None]],
    workers: int,
    timeout: float,
    probe: Callable[..., T] = measure_clip,  # type: ignore[assignment]
) -> Iterator[T | Unreadable]:
    """Probes clips in parallel; a clip that hangs or crashes its process does not stop the others.

    Args:
        clips: Path, and the part of the video if it is not all of it.
        workers: Number of processes.
        timeout: Seconds after which the process of a clip is killed.
        probe: Function of path and part; a helper process imports it, so its module should not import torch.

    Yields:
        One result per clip, in order.
    """
    with ThreadPoolExecutor(max(1, min(workers, len(clips)))) as pool:  # each thread has a helper process
        results = [pool.submit(_probe, probe, path, timeout, stretch) for path, stretch in clips]
        try:
            for result in results:
                yield result.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _probe(probe: Callable[..., T], path: Path, timeout: float, *args: Any) -> T | Unreadable:
    try:
        return call_reader(probe, path, *args, timeout=timeout)
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
