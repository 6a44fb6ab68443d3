"""Hashes of files, which identify their content under any name.

The hashes of large files are remembered in the user's cache folder, so that each stage of a pipeline need not read the
gigabytes of its base again. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

_BLOCK = 1 << 22  # bytes read at a time
_DIGITS = 16
_REMEMBERED_BYTES = 1 << 22
"""Size from which on hashes are remembered; smaller files are hashed in milliseconds."""
_SETTLED_S = 2.0
"""Age in seconds of a file whose hash is remembered: within the resolution of times, a younger one can be written again
without another modification time."""


def content_sha(path: Path) -> str:
    """Returns the first 16 hex digits of the SHA-256 of a file, or of the names and contents of a folder's files."""
    if path.is_dir():
        return files_sha(_files_of(path))[:_DIGITS]

    def read() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return _remembered("content", [path], read)[:_DIGITS]


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
    listed = list(files)

    def read() -> str:
        digest = hashlib.sha256()
        for path in listed:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        digest.update(settings.encode())
        return digest.hexdigest()

    return _remembered(f"files {settings}", listed, read)


def digest_folder() -> Path:
    """Returns the folder of remembered hashes, ``vidreason/digests`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vidreason" / "digests"


def _remembered(kind: str, files: Sequence[Path], read: Callable[[], str]) -> str:
    """Returns ``read()``, or its last result for files of the same sizes, modification times and inodes.

    A cache folder that cannot be read or written only means that the files are read again.
    """
    try:
        found = [path.stat() for path in files]
        names = "\n".join([kind, *map(os.path.abspath, files)])
        entry = digest_folder() / hashlib.sha256(names.encode()).hexdigest()[:32]
    except (OSError, RuntimeError):  # a missing file, which ``read`` reports, or a user without a home
        return read()
    if sum(stat.st_size for stat in found) < _REMEMBERED_BYTES:
        return read()
    state = [[stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_dev] for stat in found]
    with suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(entry.read_text(encoding="utf-8"))
        if known["state"] == state:
            return str(known["sha256"])
    newest = max(stat.st_mtime for stat in found)
    settled = time.time() - newest > _SETTLED_S
    digest = read()
    if settled:
        _remember(entry, {"state": state, "sha256": digest})
    return digest


def _remember(entry: Path, content: object) -> None:
    draft = entry.with_name(f".{entry.name}.{uuid4().hex}.part")
    with suppress(OSError):
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            draft.write_text(json.dumps(content), encoding="utf-8")
            os.replace(draft, entry)  # another process never reads half a file
        finally:
            draft.unlink(missing_ok=True)
