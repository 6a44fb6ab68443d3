"""Types and functions that all video readers share.

The readers run in a helper process (``helper_process.py``), which starts in a third of a second since nothing in it
imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:  # these import torch
    from torch import Tensor

    from vidreason.datamodules.types import FrameTiming

NOMINAL_FPS = 25.0
"""Assumed frames per second of videos without times: pictures in an archive or a folder, placeholder videos."""
MAX_FRAME_PIXELS = 64_000_000
"""Largest frame that is decoded, as height x width; one of this size takes 192 MB."""

Pixels = NDArray[np.uint8]
"""Frames [T, H, W, 3] or one frame [H, W, 3], RGB."""


class DecodeError(ValueError):
    """Raised for a clip that cannot be read; the message names its path and each reader's error."""


@dataclass(frozen=True)
class DecodedFrames:
    """The sampled frames of one clip, as a reader returns them."""

    pixels: Pixels
    """[T, H, W, 3] uint8"""
    fps: float
    """Frames per second of the file; the highest rate if it varies."""
    total: int
    """Length of the clip in frames at that rate."""
    indices: tuple[int, ...]
    """[T] times of the frames from the start of the clip on, in units of 1 / fps."""
    frames_in_file: int
    """Frames of the clip."""
    reader: str
    """``decord``, ``pyav``, ``torchcodec``, ``pictures`` or ``memory``."""
    partial: bool = False
    """True if parts of the file could not be read."""
    why: str = ""
    """Reason why PyAV was used; empty if another reader was used, or never reads such files."""
    size: tuple[int, int] = (0, 0)
    """Width and height of the first frame before it was resized, upright."""


@dataclass(frozen=True)
class DecodedVideo:
    """The sampled frames of one clip."""

    frames: Tensor
    """[T, 3, H, W] uint8"""
    timing: FrameTiming
    frames_in_file: int
    reader: str
    """``decord``, ``pyav``, ``pictures`` or ``memory``."""
    partial: bool = False
    """True if parts of the file could not be read."""


def fit_size(height: int, width: int, max_pixels: int | None) -> tuple[int, int]:
    """Returns the size, reduced to ``max_pixels`` with the same aspect ratio if it is larger.

    Example:
        >>> fit_size(480, 640, 76_800)
        (240, 320)
        >>> fit_size(480, 640, 1_000_000)
        (480, 640)
    """
    if max_pixels is None or height * width <= max_pixels:
        return height, width
    scale = math.sqrt(max_pixels / (height * width))
    small = max(int(min(height, width) * scale), 1)
    large = min(max(int(max(height, width) * scale), 1), max_pixels // small)
    return (small, large) if height <= width else (large, small)


def resize(frame: Pixels, size: tuple[int, int]) -> Pixels:
    """Resizes one frame [H, W, 3] to (height, width), bilinear with antialiasing; the same array if it has the size."""
    if frame.shape[:2] == size:
        return frame
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def check_frame_size(width: int, height: int) -> None:
    """Checks that a frame is small enough to be decoded.

    Raises:
        DecodeError: If it has more than ``MAX_FRAME_PIXELS``; the message does not name the file.
    """
    if width * height > MAX_FRAME_PIXELS:
        raise DecodeError(
            f"frames of {width} x {height} pixels, more than the {MAX_FRAME_PIXELS // 10**6} megapixels that are "
            "decoded; shrink the video"
        )


def first_line(error: Any) -> str:
    """Returns one line of an error message, which may be a C++ stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
