"""Types and functions that all video readers share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from vidreason.datamodules.types import FrameTiming

NOMINAL_FPS = 25.0
"""Assumed frames per second where there are no times: pictures in an archive, placeholder videos"""


class DecodeError(ValueError):
    """Raised for a clip that cannot be read; the message names its path and each reader's error."""


@dataclass(frozen=True)
class DecodedVideo:
    """The sampled frames of one clip."""

    frames: Tensor
    """[T, 3, H, W] uint8"""
    timing: FrameTiming
    frames_in_file: int
    reader: str
    """decord, pyav, zip or memory"""
    partial: bool = False
    """True where parts of the file could not be read."""


def fit_size(height: int, width: int, max_pixels: int | None) -> tuple[int, int]:
    """Returns the size reduced to a pixel budget, with the same aspect ratio; unchanged if it fits.

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


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes [..., 3, H, W] uint8; returns the same tensor if it already has the size."""
    if tuple(frames.shape[-2:]) == size:
        return frames
    resized: Tensor = vision.resize(frames, list(size), antialias=True)
    return resized


def first_line(error: BaseException) -> str:
    """Returns one line of an error message, which may be a C++ stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
