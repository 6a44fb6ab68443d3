"""Probes clips before a data set is made, in processes that can be killed.

A decoder may hang so that only SIGKILL ends it, or crash the whole process. Each clip therefore has a
time limit, and a worker that exceeds it or dies is replaced.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import dataclass
from pathlib import Path

import torch
from pebble import ProcessExpired, ProcessPool

from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.datamodules.clips.decoding import FrameOptions, read_frames
from vidreason.datamodules.file_hash import content_sha

_LOOK = FrameOptions(num_frames=4)  # spread over the clip; four frames of a 4K video are 100 MB, and a copy of them
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class ClipProbe:
    """Properties of a readable clip."""

    sha: str
    """As ``content_sha`` gives it"""
    frames: int
    fps: float
    """Frames per second"""
    width: int
    """Pixels, upright"""
    height: int
    partial: bool
    """True where parts of the file could not be read"""

    @property
    def seconds(self) -> float:
        """Length of the clip in seconds."""
        return self.frames / self.fps


@dataclass(frozen=True)
class Unreadable:
    """Why a clip cannot be used."""

    reason: str


def probe_clip(path: Path) -> ClipProbe:
    """Reads a few frames of a clip as training would, and hashes its content.

    Raises:
        DecodeError: If no frame can be read; the message does not repeat the path.
    """
    try:
        _check_clip_file(path)
        video = read_frames(path, _LOOK)
        sha = content_sha(path)
    except DecodeError as error:
        raise DecodeError(_reason(str(error).removeprefix(f"{path}: "))) from error
    except OSError as error:
        raise DecodeError(error.strerror or str(error)) from error
    height, width = video.frames.shape[-2:]
    return ClipProbe(sha, video.frames_in_file, video.timing.fps, width, height, video.partial)


def _check_clip_file(path: Path) -> None:
    """Checks for files that decoders only report as invalid: missing, empty, or a Git LFS pointer."""
    if not path.is_file():
        raise DecodeError("no such file" if not path.exists() else "not an ordinary file")
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if not start:
        raise DecodeError("the file is empty")
    if start == _LFS_POINTER:
        raise DecodeError("a Git LFS pointer and not the clip itself: run `git lfs pull` in its repository")


def _reason(message: str) -> str:
    """Returns the last reader's error without numbers and paths; the first reader's is a C++ stack trace."""
    last = message.partition("; decord: ")[0]
    return re.sub(r"\[Errno -?\d+\] |: '/.*'$", "", last)


def probe_clips(
    paths: Sequence[Path],
    workers: int,
    timeout: float,
    probe: Callable[[Path], ClipProbe] = probe_clip,
) -> Iterator[ClipProbe | Unreadable]:
    """Probes clips in parallel; a clip that hangs or crashes its process does not stop the others.

    Args:
        paths: The clips.
        workers: Processes.
        timeout: Seconds that one clip may take before its process is killed.
        probe: What is done to each; must be importable in another process.

    Yields:
        One result per path, in order.
    """
    pool = ProcessPool(max_workers=max(1, min(workers, len(paths))), context=_context(), initializer=_settle)
    try:
        futures = [pool.schedule(probe, args=[path], timeout=timeout) for path in paths]
        for future in futures:
            try:
                yield future.result()
            except OutOfTime:
                yield Unreadable(f"still not read after {timeout:g} seconds")
            except ProcessExpired as error:
                yield Unreadable(f"the decoder crashed (exit status {error.exitcode})")
            except (DecodeError, MemoryError, RuntimeError) as error:
                yield Unreadable(" ".join(str(error).split()) or type(error).__name__)
    finally:
        pool.stop()  # type: ignore[no-untyped-call]
        pool.join()


def _settle() -> None:
    """Sets up a worker: one thread, since workers share the machine, and no C++ messages in the progress bar."""
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # stderr, to which FFmpeg and OpenCV write directly
    os.close(nowhere)


def _context() -> multiprocessing.context.BaseContext:
    """Returns a context whose workers are forked from a clean server process, or else spawned."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
