"""Atomic writes: a full disk or a killed process never leaves a partly written file or folder behind."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` and renames it to ``path`` when the block ends without an error.

    Raises:
        OSError: If the file cannot be written; the message names ``path``, which stays as it was.
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
    """Adds ``path`` to every OSError of the block: Python names the file when opening fails, not when writing fails."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 atomically."""
    with atomic_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def flush_to_disk(path: Path) -> None:
    """Flushes a file, or every file in a folder, to the disk, so that a later rename cannot reach the disk first."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with naming(file), file.open("rb") as handle:
                os.fsync(handle.fileno())


def replace_folder(draft: Path, folder: Path) -> None:
    """Replaces ``folder`` by ``draft``; a folder that exists stays available at every moment.

    Where the system cannot exchange two folders (not Linux, some network file systems) the old one is renamed first, to
    ``NAME.old``.

    Raises:
        OSError: If the system cannot rename.
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
    """Exchanges two paths atomically; returns False if the system does not support it."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
