"""Stores embeddings on disk: one safetensors file per video, written atomically, checked when read, limited in size.

Several processes may use a folder at once: files are written atomically, equal keys mean equal content, and a file that
another process removes is a cache miss.
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
"""Age in seconds of an unfinished file whose writer must have died"""

Entry = Mapping[str, Tensor]
"""Tensors by name, on the CPU"""


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
        folder: Where; made on the first write.
        max_gb: Most GB of 1e9 bytes that the files may take together; the ones longest unused go first.
    """

    def __init__(self, folder: Path, max_gb: float) -> None:
        self.folder = folder
        self.max_bytes = int(max_gb * GB)
        self._bytes: int | None = None
        self._writing_stopped = False
        self._announced = False

    @property
    def bytes(self) -> int:
        """Size of the files in bytes when the folder was last listed."""
        if self._bytes is None:
            self._bytes = sum(entry.size for entry in self._look())
        return self._bytes

    def path(self, key: str) -> Path:
        """Returns the path of the entry of a key, which may not exist."""
        return self.folder / f"{key}{SUFFIX}"

    def read(self, key: str) -> Entry | None:
        """Returns the entry of a key; None if there is none or its file is damaged, which is reported and removed."""
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                entry = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            self._damaged(path, str(error).splitlines()[0])
            return None
        if metadata.get("key") != key or metadata.get("sha256") != _sha(entry):
            self._damaged(path, "its content is not what was written")
            return None
        with suppress(OSError):  # another run's bound has just removed it, or the folder is read-only
            os.utime(path)  # now the one used last
        return entry

    def write(self, key: str, entry: Entry) -> None:
        """Writes an entry within the size limit; if the disk fails, warns once and stops writing."""
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
            save_file(dict(entry), draft, metadata={"key": key, "sha256": _sha(entry)})
            size = draft.stat().st_size
            self._make_room(size)
            os.replace(draft, self.path(key))
        except (OSError, SafetensorError) as error:  # safetensors wraps a full disk
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
        """Lists the entries, and removes unfinished files of processes that have died."""
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


def _sha(entry: Entry) -> str:
    digest = hashlib.sha256()
    for name in sorted(entry):
        tensor = entry[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
