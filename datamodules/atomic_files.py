"""Files that are written whole or not at all: a full disk or a killed process leaves nothing half-written behind."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a draft of the same suffix beside ``path``, which it becomes when the block ends well.

    Raises:
        OSError: Naming ``path``, where the system refuses; the draft is removed and ``path`` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with naming(path):
            yield draft
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets the system's refusals say which file they are about; Python knows when it opens one, not when it writes."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all."""
    with atomic_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or every file in a folder, is on the disk: a rename may otherwise get there before it."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with naming(file), file.open("rb") as handle:
                os.fsync(handle.fileno())


def replace_folder(draft: Path, folder: Path) -> None:
    """Puts ``draft`` in the place of ``folder``, which is there at every moment if it was there before.

    Where the system cannot exchange two folders (not Linux, some network file systems) the old one is renamed first, to
    ``NAME.old``.

    Raises:
        OSError: Where the system refuses.
    """
    if not folder.exists():
        draft.rename(folder)
        return
    if _exchange(draft, folder):
        shutil.rmtree(draft)
        return
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two paths in one stroke; False where the system has no way to."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
