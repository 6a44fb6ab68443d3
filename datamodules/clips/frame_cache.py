"""A cache of decoded frames on disk, shared by processes and runs.

An entry is named by the content of the file and everything else that decides which frames are taken and how large they
are. It is one file: a line with a checksum of all that follows, a line of JSON, and the frames [T, 3, H, W], either as
they are or each as JPEG. Reading one takes a single copy and needs no other process; an entry that is not what was
written is decoded anew.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vidreason.datamodules.bounded_folder import BoundedFolder, FullError
from vidreason.datamodules.clips.decoded import DecodedVideo, Pixels
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.sampling import Stretch
from vidreason.datamodules.types import FrameTiming

GB = 10**9
SUFFIX = ".frames"
_FORMAT = 1  # of the files; part of their names
_PYAV = version("av")  # another one may decode other frames; decord has had one version since 2021
_IN_USE_S = 24 * 3600.0
_JPEG_QUALITY = 95
_MOST_HEADER = 1 << 20  # bytes
_Damage = (ValueError, KeyError, TypeError, EOFError)  # JSON and UTF-8 errors are ValueErrors


@dataclass
class CacheCounts:
    """Counts how many clips this process has read from the cache of frames, and how many it has written to it."""

    read: int = 0
    written: int = 0


class FrameCache:
    """A folder of decoded frames.

    Entries that were not used for a day are removed first if the folder is full. Younger ones stay: if each new clip
    replaced another clip of the same epoch, a folder smaller than the data set would hardly serve any.

    Args:
        folder: The folder.
        max_gb: Size limit in GB of 1e9 bytes.
    """

    def __init__(self, folder: Path, max_gb: float) -> None:
        self.folder = BoundedFolder(folder, SUFFIX, int(max_gb * GB), _IN_USE_S)
        self.max_gb = max_gb
        self.counts = CacheCounts()
        self.stopped = ""
        """The reason why nothing more is written; empty while entries are written."""

    def read(self, key: str) -> DecodedVideo | None:
        """Returns the entry of a key, or None if there is none; a damaged one is removed with a warning."""
        path = self.folder.path(key)
        try:
            with path.open("rb") as file:
                video = _read_entry(file, key)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, *_Damage) as error:
            warnings.warn(f"{path}: damaged, the clip is decoded again ({error})", stacklevel=2)
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        self.folder.mark_used(path)
        self.counts.read += 1
        return video

    def write(self, key: str, video: DecodedVideo, encoded: list[bytes] | None) -> None:
        """Writes an entry; if that fails, says so once and writes nothing from then on.

        Args:
            key: Name of the entry.
            video: The frames, of which nothing was lost.
            encoded: Each frame as JPEG, if they are to be stored like this.
        """
        if self.stopped:
            return
        entry = _entry(key, video, encoded)
        try:
            self.folder.write(key, sum(memoryview(part).nbytes for part in entry), lambda path: _write_all(path, entry))
        except FullError:
            self._stop(f"it has {self.folder.bytes / GB:.3g} of {self.max_gb:g} GB: raise frames.cache_gb")
        except OSError as error:
            self._stop(f"{error}: free some space, or set frames.cache to another folder or null")
        else:
            self.counts.written += 1

    def _stop(self, reason: str) -> None:
        self.stopped = reason
        warnings.warn(f"{self.folder.folder}: no more frames are stored, {reason}", stacklevel=3)


@cache
def frame_cache(folder: str, max_gb: float) -> FrameCache:
    """Returns the cache of a folder; one in each process."""
    return FrameCache(Path(folder).expanduser(), max_gb)


def entry_key(content: str, options: FrameOptions, stretch: Stretch | None) -> str:
    """Returns the name of an entry.

    Args:
        content: Hash of the file.
        options: Options of the frames; their text names all that decides about them.
        stretch: The part of the video; None is all of it.
    """
    read = replace(options, probe="none")  # which changes frames after they were read
    parts = [_FORMAT, _PYAV, content, repr(read), None if stretch is None else asdict(stretch)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def as_jpeg(frames: Tensor) -> list[bytes]:
    """Encodes frames [T, 3, H, W] one by one."""
    done = []
    for frame in frames.permute(0, 2, 3, 1).contiguous().numpy():
        content = io.BytesIO()
        Image.fromarray(frame).save(content, "JPEG", quality=_JPEG_QUALITY)
        done.append(content.getvalue())
    return done


def from_jpeg(encoded: Sequence[bytes]) -> Tensor:
    """Decodes frames to [T, 3, H, W]."""
    frames: list[Pixels] = []
    for content in encoded:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            frames.append(np.asarray(image.convert("RGB")))
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def _entry(key: str, video: DecodedVideo, encoded: list[bytes] | None) -> list[bytes | memoryview]:
    """Returns the parts of the file of an entry."""
    header = {
        "key": key,
        "shape": tuple(video.frames.shape),
        "fps": video.timing.fps,
        "total": video.timing.total_frames,
        "indices": video.timing.indices,
        "frames_in_file": video.frames_in_file,
        "reader": video.reader,
        "jpeg": None if encoded is None else [len(content) for content in encoded],
    }
    frames = [video.frames.contiguous().view(-1).numpy().data]
    parts = [json.dumps(header).encode() + b"\n", *(frames if encoded is None else encoded)]
    return [b"%08x\n" % _checksum(parts), *parts]


def _write_all(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    with path.open("wb") as file:
        for part in parts:
            file.write(part)


def _read_entry(file: BinaryIO, key: str) -> DecodedVideo:
    """Reads an entry.

    Raises:
        ValueError: If it is not what was written.
    """
    checksum = int(file.read(9), 16)
    line = file.readline(_MOST_HEADER)
    header: dict[str, Any] = json.loads(line)
    if header["key"] != key:
        raise ValueError("another entry's content")
    sizes = header["jpeg"]
    size = int(np.prod(header["shape"])) if sizes is None else sum(sizes)
    if size != os.fstat(file.fileno()).st_size - 9 - len(line):
        raise ValueError("incomplete")
    content = np.empty(size, np.uint8)
    file.readinto(content.data)  # type: ignore[attr-defined]  # one copy; a mapped file may vanish underneath
    if _checksum([line, content.data]) != checksum:
        raise ValueError("wrong checksum")
    if sizes is None:
        frames = torch.from_numpy(content).view(*header["shape"])
    else:
        ends = np.cumsum(sizes)
        parts = [content[end - size : end].tobytes() for end, size in zip(ends, sizes, strict=True)]
        frames = from_jpeg(parts)
    timing = FrameTiming(header["fps"], header["total"], tuple(header["indices"]))
    return DecodedVideo(frames, timing, header["frames_in_file"], header["reader"])


def _checksum(parts: Sequence[bytes | memoryview]) -> int:
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum
