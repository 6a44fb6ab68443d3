"""Measures a clip: what ``vidreason init`` and ``vidreason data check`` say about it. Runs in a helper process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vidreason.datamodules.clips.decoded import Pixels
from vidreason.datamodules.clips.decoding import FrameOptions, decode
from vidreason.datamodules.clips.sampling import Stretch
from vidreason.datamodules.file_hash import content_sha

_LOOK = FrameOptions(num_frames=8, max_pixels=256 * 256)  # spread over the clip
_HASH_SIDE = 16  # points of a frame's hash in each direction
_CONTRAST = 4  # grey levels between neighbouring points that make a bit; less is noise of the encoder
_BLACK = 20  # grey level
_FROZEN = 3  # grey levels; the noise of an encoder
_STILL = 0.999  # part of the pixels


@dataclass(frozen=True)
class ClipProbe:
    """Properties of a readable clip."""

    sha: str
    """Content hash of the file (``content_sha``)."""
    frames: int
    fps: float
    """Frames per second; the mean rate if it varies."""
    width: int
    """Width in pixels, after rotation."""
    height: int
    partial: bool
    """True if parts of the file could not be read."""
    reader: str = ""
    """Name of the reader that training uses for this clip: ``decord``, ``pyav`` or ``pictures``."""
    why: str = ""
    """Reason why the reader is not decord; empty if decord reads the clip, or never reads such files."""
    looks: bytes = b""
    """Perceptual hash of eight frames; copies in another size or quality share most bits (``perceptual_hash``)."""
    dull: str = ""
    """``black`` or ``constant`` if it shows nothing or nothing moves; else empty."""

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
    fps = read.frames_in_file * read.fps / read.total  # total is counted at the highest rate
    return ClipProbe(
        *(content_sha(path), read.frames_in_file, fps, *read.size, read.partial, read.reader, read.why),
        looks=perceptual_hash(read.pixels),
        dull=_dullness(read.pixels),
    )


def perceptual_hash(frames: Pixels) -> bytes:
    """Returns the difference hash of frames: where brightness rises or falls, in space and in time.

    The first half of the bits compares each point with the next on its right (dHash), the second half with the same
    point in the next frame: clips of one fixed camera share the first half, and only copies share both.

    Args:
        frames: [T, H, W, 3] uint8

    Returns:
        Packed bits: 2 x T x 16 x 16 for space, then as many for time.
    """
    size = (_HASH_SIDE + 1, _HASH_SIDE)
    small = np.stack(
        [np.asarray(Image.fromarray(frame).convert("L").resize(size, Image.Resampling.BOX)) for frame in frames]
    ).astype(np.int16)
    space = np.diff(small, axis=2)
    time = np.roll(small, -1, axis=0)[..., 1:] - small[..., 1:]
    halves = [np.stack([steps > _CONTRAST, steps < -_CONTRAST]) for steps in (space, time)]
    return np.packbits(np.concatenate([half.ravel() for half in halves])).tobytes()


def _dullness(frames: Pixels) -> str:
    if int(frames.max()) <= _BLACK:
        return "black"
    spread = frames.max(axis=0).astype(np.int16) - frames.min(axis=0)
    return "constant" if np.quantile(spread, _STILL) <= _FROZEN else ""
