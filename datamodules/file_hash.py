"""Hashes of files, which identify their content under any name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_BLOCK = 1 << 22  # bytes read at a time
_DIGITS = 16


def content_sha(path: Path) -> str:
    """Returns the first 16 hex digits of the SHA-256 of a file, or of the names and contents of a folder's files."""
    if path.is_dir():
        return files_sha(_files_of(path))[:_DIGITS]
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]


def file_version(path: Path) -> str:
    """Returns a text that changes when a file, or one of a folder's files, is written or replaced; nothing is opened.

    Raises:
        OSError: If there is no such file.
    """
    found = [path.stat(), *(file.stat() for file in (_files_of(path) if path.is_dir() else ()))]
    # The time of the last change of the inode cannot be set, unlike that of the content.
    return " ".join(f"{stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino} {stat.st_size}" for stat in found)


def clip_version(path: Path) -> str | None:
    """Returns the ``file_version`` of a file or folder; None if it is neither, so that reading it might block.

    Raises:
        OSError: If it cannot be looked at.
    """
    return file_version(path) if path.is_file() or path.is_dir() else None


def file_size(path: Path) -> int | None:
    """Returns the size of an ordinary file in bytes; None if it is something else."""
    return path.stat().st_size if path.is_file() else None


def _files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def files_sha(files: Iterable[Path], settings: str = "") -> str:
    """Returns the SHA-256 of the names and contents of files.

    Args:
        files: The files, in an order that does not depend on the machine.
        settings: Further text that is hashed after the files.
    """
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    digest.update(settings.encode())
    return digest.hexdigest()
