"""A folder of files that several processes share at the same time, within a size limit.

Files are written under another name and renamed, so that a killed process or a full disk leaves no incomplete entry;
equal names mean equal content, and a file that another process has removed is a miss.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

_STALE_S = 3600.0  # age above which the writer of an unfinished file is assumed dead
_LISTING_S = 1.0  # age above which a listing of the folder does not count, since others write there, too
_ROOM = 0.9  # part of the limit that stays filled where files are removed, so that not every write lists the folder


class FullError(Exception):
    """Raised if a file does not fit into the limit beside those that are in use."""


class _File(NamedTuple):
    used: float
    size: int
    path: Path


class BoundedFolder:
    """A folder of files within a size limit.

    Args:
        folder: The folder; it is created by the first write.
        suffix: Suffix of the files.
        max_bytes: Size limit. Each process that writes may exceed it by the file it writes.
        keep_s: Seconds for which a file stays after its last use; 0 removes the least recently used ones at any age.
    """

    def __init__(self, folder: Path, suffix: str, max_bytes: int, keep_s: float = 0.0) -> None:
        self.folder = folder
        self.suffix = suffix
        self.max_bytes = max_bytes
        self.keep_s = keep_s
        self._bytes = 0
        self._listed = -_LISTING_S
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """Size of all files in bytes, at most a second ago."""
        if time.monotonic() - self._listed > _LISTING_S:
            self._list()
        return self._bytes

    def path(self, key: str) -> Path:
        """Returns the path of a key's file, which may not exist."""
        return self.folder / f"{key}{self.suffix}"

    def mark_used(self, path: Path) -> None:
        """Sets the modification time of a file, which is the time of its last use."""
        with suppress(OSError):  # another process has just removed it, or the folder is read-only
            os.utime(path)

    def write(self, key: str, size: int, write: Callable[[Path], object]) -> None:
        """Writes a file and removes others if the folder is full.

        Args:
            key: Its name without suffix.
            size: Its size in bytes.
            write: Writes it to a path.

        Raises:
            FullError: If it does not fit.
            OSError: If it cannot be written; the message names the file.
        """
        path = self.path(key)
        draft = self.folder / f".{key}.{uuid4().hex}.part"
        try:
            with self._lock:
                self._make_room(size)
            self.folder.mkdir(parents=True, exist_ok=True)
            write(draft)
            os.replace(draft, path)
        except OSError as error:  # Python names a file only if opening it fails
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
        self._bytes += size

    def _make_room(self, size: int) -> None:
        """Removes the least recently used files if ``size`` bytes do not fit.

        Raises:
            FullError: If they still do not fit.
        """
        if self.bytes + size <= self.max_bytes:
            return
        files = self._list()
        if self._bytes + size <= self.max_bytes:
            return
        oldest_kept = time.time() - self.keep_s
        for file in sorted(files):
            if file.used > oldest_kept or self._bytes + size <= _ROOM * self.max_bytes:
                break
            file.path.unlink(missing_ok=True)
            self._bytes -= file.size
        if self._bytes + size > self.max_bytes:
            raise FullError

    def _list(self) -> list[_File]:
        """Lists the files and removes unfinished ones of processes that have died."""
        found: list[_File] = []
        total = 0
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue
                if entry.name.endswith(".part") and time.time() - stat.st_mtime > _STALE_S:
                    Path(entry.path).unlink(missing_ok=True)
                    continue
                if entry.name.endswith(self.suffix):
                    found.append(_File(stat.st_mtime, stat.st_size, Path(entry.path)))
                if entry.name.endswith((self.suffix, ".part")):
                    total += stat.st_size
        self._bytes, self._listed = total, time.monotonic()
        return found
