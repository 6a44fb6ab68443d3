"""Stores embeddings on disk: one safetensors file per video, checked when it is read, within a size limit.

Several processes may use a folder at the same time: files are written atomically, equal keys mean equal content, and a
file that another process has removed is a cache miss.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vidreason.lightning_modules.vlms.vision_cache.vision_path import tensor_bytes

GB = 1e9
SUFFIX = ".safetensors"
STALE_S = 3600.0
"""Age in seconds above which the writer of an unfinished file is assumed dead."""

Entry = Mapping[str, Tensor]
"""Tensors by name, on the CPU."""


def entry_bytes(entry: Entry) -> int:
    """Returns the size of the tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in entry.values())


class _Found(NamedTuple):
    used: float
    size: int
    path: Path


class EmbeddingStore:
    """A folder of embeddings.

    Args:
        folder: The folder; it is created by the first write.
        max_gb: Size limit of all files in GB of 1e9 bytes; the least recently used files are removed first.
    """

    def __init__(self, folder: Path, max_gb: float) -> None:
        self.folder = folder
        self.max_bytes = int(max_gb * GB)
        self._bytes: int | None = None
        self._writing_stopped = False
        self._announced = False

    @property
    def bytes(self) -> int:
        """Size of all files in bytes when the folder was last listed."""
        if self._bytes is None:
            self._bytes = sum(entry.size for entry in self._look())
        return self._bytes

    def path(self, key: str) -> Path:
        """Returns the path of a key's entry, which may not exist."""
        return self.folder / f"{key}{SUFFIX}"

    def read(self, key: str, prefix: str = "") -> Entry | None:
        """Returns the entry of a key, or None if there is none; a damaged file is removed with a warning.

        Args:
            key: The key.
            prefix: Only tensors whose names begin with it are read.
        """
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a dict
                entry = {name: file.get_tensor(name).clone() for name in names}
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            self._damaged(path, str(error).splitlines()[0])
            return None
        if metadata.get("key") != key or any(metadata.get(name) != sha for name, sha in _shas(entry).items()):
            self._damaged(path, "its content is not what was written")
            return None
        with suppress(OSError):  # another process has just removed it, or the folder is read-only
            os.utime(path)  # the modification time is the time of last use, for the size limit
        return entry

    def write(self, key: str, entry: Entry) -> None:
        """Writes an entry within the size limit; if writing fails, warns once and writes nothing from then on."""
        size = entry_bytes(entry)
        if self._writing_stopped:
            return
        if not self._announced:
            self._announce(size)
        if size > self.max_bytes:
            self._stop_writing(f"one clip takes {size / GB:.3g} GB and vlm.vision_cache.max_gb is less")
            return
        draft = self.folder / f".{key}.{uuid4().hex}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(dict(entry), draft, metadata={"key": key, **_shas(entry)})
            size = draft.stat().st_size
            self._make_room(size)
            os.replace(draft, self.path(key))
        except (OSError, SafetensorError) as error:  # safetensors raises its own error for a full disk
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            self._stop_writing(str(error).splitlines()[0])
            return
        self._bytes = self.bytes + size

    def _announce(self, size: int) -> None:
        self._announced = True
        fit = self.max_bytes // max(size, 1)
        rank_zero_info(
            f"vision embeddings take {size / 1e6:.3g} MB a clip; {self.folder} will hold at most "
            f"{self.max_bytes / GB:.3g} GB, about {fit} clips (vlm.vision_cache.max_gb)"
        )

    def _make_room(self, size: int) -> None:
        """Removes the least recently used files until ``size`` bytes fit."""
        found = self._look()
        total = sum(entry.size for entry in found)
        for entry in sorted(found):
            if total + size <= self.max_bytes:
                break
            entry.path.unlink(missing_ok=True)
            total -= entry.size
        self._bytes = total

    def _look(self) -> list[_Found]:
        """Lists the entries and removes unfinished files of processes that have died."""
        found: list[_Found] = []
        if not self.folder.is_dir():
            return found
        now = time.time()
        with os.scandir(self.folder) as files:
            for file in files:
                try:
                    stat = file.stat()
                except FileNotFoundError:
                    continue
                if file.name.endswith(SUFFIX):
                    found.append(_Found(stat.st_mtime, stat.st_size, Path(file.path)))
                elif file.name.endswith(".part") and now - stat.st_mtime > STALE_S:
                    Path(file.path).unlink(missing_ok=True)
        return found

    def _stop_writing(self, reason: str) -> None:
        self._writing_stopped = True
        warnings.warn(
            f"vision embeddings are not written to {self.folder}: {reason}; they stay in memory only", stacklevel=3
        )

    def _damaged(self, path: Path, reason: str) -> None:
        warnings.warn(f"{path} is damaged and will be computed anew: {reason}", stacklevel=3)
        path.unlink(missing_ok=True)


def _shas(entry: Entry) -> dict[str, str]:
    """Returns the SHA-256 of each tensor, with its name, dtype and shape."""
    found = {}
    for name, tensor in entry.items():
        digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
        found[name] = digest.hexdigest()
    return found
