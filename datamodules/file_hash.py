"""Hashes of files, which identify their content under any name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_BLOCK = 1 << 22  # bytes read at a time
_DIGITS = 16


def content_sha(path: Path) -> str:
    """Returns the first 16 hex digits of the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]


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
