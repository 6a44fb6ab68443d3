"""Measures a clip: what ``vidreason init`` and ``vidreason data check`` say about it. Runs in a helper process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vidreason.datamodules.clips.decoding import FrameOptions, decode
from vidreason.datamodules.clips.sampling import Stretch
from vidreason.datamodules.file_hash import content_sha

_LOOK = FrameOptions(num_frames=4)  # spread over the clip


@dataclass(frozen=True)
class ClipProbe:
    """Properties of a readable clip."""

    sha: str
    """Content hash of the file (``content_sha``)."""
    frames: int
    fps: float
    """Frames per second."""
    width: int
    """Width in pixels, after rotation."""
    height: int
    partial: bool
    """True if parts of the file could not be read."""
    reader: str = ""
    """What reads it: ``decord``, ``pyav`` or ``pictures``."""
    why: str = ""
    """Why it is not decord; empty if there is no choice."""

    @property
    def seconds(self) -> float:
        """Length of the clip in seconds."""
        return self.frames / self.fps


def measure_clip(path: Path, stretch: Stretch | None = None) -> ClipProbe:
    """Reads a few frames of a clip with the readers of training, and hashes its content.

    Raises:
        DecodeError: If no frame can be read.
    """
    read = decode(path, _LOOK, stretch=stretch)
    height, width = read.pixels.shape[1:3]
    return ClipProbe(
        content_sha(path), read.frames_in_file, read.fps, width, height, read.partial, read.reader, read.why
    )
