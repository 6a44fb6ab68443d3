"""Calls functions that open or look at files within a time limit, in a helper process; nothing here imports torch.

All parts of the program touch clips in this way, since even looking for a file blocks on a dead network mount.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

from vidreason.datamodules.clips import helper_process
from vidreason.datamodules.clips.decoded import DecodeError

T = TypeVar("T")
P = TypeVar("P", Path, str)
LOOK_TIMEOUT = 60.0
"""Seconds that looking at a few files may take where no setting says it."""
ANSWER_TIMEOUT = 20.0
"""Seconds until a path that the user names is taken for one on a dead mount."""
WALK_TIMEOUT = 600.0
"""Seconds that listing everything below a folder may take."""
NO_FILE = "a pipe or a device, and no ordinary file; save its content as a file"
Kind = Literal["file", "folder", "other"]


class ReadStoppedError(DecodeError):
    """Raised for a clip that was being read when the run was stopped by a signal."""


class ReadTimeoutError(DecodeError):
    """Raised for a clip that is not read within the time limit."""


def call_reader(function: Callable[..., T], path: Path, *args: Any, timeout: float | None) -> T:
    """Calls a function that opens a clip, in a helper process.

    Args:
        function: A function of a module that does not import torch; its first argument is the path.
        path: The clip.
        args: Further arguments.
        timeout: Seconds that it may take; None calls it in this process.

    Raises:
        DecodeError: If it takes longer or crashes, or has raised one.
    """
    if timeout is None or os.name == "nt":
        return function(path, *args)
    try:
        return helper_process.call(function, path, *args, timeout=timeout)
    except helper_process.StoppedError as error:
        raise ReadStoppedError(f"{path}: {error}") from error
    except helper_process.TimeLimitError as error:
        raise ReadTimeoutError(f"{path}: {error}") from error
    except helper_process.HelperError as error:
        raise DecodeError(f"{path}: {error}") from error
    except MemoryError as error:
        raise DecodeError(f"{path}: not enough memory") from error


def look_at(path: Path, timeout: float | None = ANSWER_TIMEOUT) -> Kind | None:
    """Returns what a path leads to, ``other`` being a pipe, a socket or a device; None if nothing can be found there.

    A byte of a file and a name in a folder are read, since a dead mount may still tell what it held.

    Raises:
        ReadTimeoutError: If it does not answer; the message names it.
        OSError: If it cannot be told what is there, such as behind a folder without permission.
    """
    try:
        return call_reader(_look_at, path, timeout=timeout)
    except ReadTimeoutError as error:
        raise ReadTimeoutError(
            f"{path}: no answer within {timeout:g} seconds: repair the disk or network mount, or name another place"
        ) from error


def _look_at(path: Path) -> Kind | None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last one for a zero byte
        return None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return None
        raise
    if stat.S_ISDIR(mode):
        with suppress(OSError), os.scandir(path) as entries:
            next(entries, None)
        return "folder"
    if not stat.S_ISREG(mode):
        return "other"  # opening a pipe blocks
    with suppress(OSError), path.open("rb") as file:
        file.read(1)
    return "file"


def call_for_files(
    function: Callable[[P], T], paths: Sequence[P], timeout: float | None, at_once: int = 64
) -> Iterator[T | None]:
    """Calls a function for many files, some of them in each call of the helper process.

    Args:
        function: A function of a module that does not import torch, quick for a file that is not stuck.
        paths: The files.
        timeout: Seconds that a call for some files may take; None calls it in this process.
        at_once: Files of a call.

    Yields:
        The result of each file, in order; None if it crashes the helper process or cannot be read.

    Raises:
        ReadTimeoutError: If a file does not answer; the message names it.
    """
    for first in range(0, len(paths), at_once):
        some: Sequence[P] = paths[first : first + at_once]
        results: list[T | None]
        try:
            results = [*call_reader(_call_each, Path(some[0]), function, some, timeout=timeout)]
        except ReadStoppedError:
            raise
        except (DecodeError, OSError):  # which of them it is, only single calls tell
            results = [_call_one(function, path, timeout) for path in some]
        yield from results


def existing(paths: Iterable[Path], timeout: float | None) -> set[Path]:
    """Returns the paths at which there is anything.

    Raises:
        ReadTimeoutError: If one of them does not answer.
    """
    wanted = list(dict.fromkeys(paths))
    found = call_for_files(os.path.exists, wanted, timeout, at_once=256)
    return {path for path, there in zip(wanted, found, strict=True) if there}


def _call_one(function: Callable[[P], T], path: P, timeout: float | None) -> T | None:
    try:
        results: list[T] = call_reader(_call_each, Path(path), function, [path], timeout=timeout)
    except (ReadStoppedError, ReadTimeoutError):
        raise
    except (DecodeError, OSError):
        return None
    return results[0]


def _call_each(first: Path, function: Callable[[P], T], paths: Sequence[P]) -> list[T]:
    """Calls a function for each path; ``first`` only names the call in messages."""
    return [function(path) for path in paths]
