"""Decoding: reads the sampled frames of a file.

There are two readers. decord is fast and is used by default if it is installed; PyAV is always installed and reads
what decord cannot (AV1, GIF, damaged or truncated files). On intact files both return the same frames, chosen by
presentation time, so that variable frame rates are sampled evenly. A reader is opened for each clip with one thread and
not kept, so that worker processes may be forked or spawned.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from vidreason.datamodules.clips.decoded import NOMINAL_FPS, DecodedVideo, DecodeError, first_line, fit_size, resize
from vidreason.datamodules.clips.frame_zip import read_pictures
from vidreason.datamodules.clips.pyav_reader import read_with_pyav
from vidreason.datamodules.clips.sampling import (
    FrameChooser,
    choose_by_time,
    fps_indices,
    segment_indices,
    uniform_indices,
)
from vidreason.datamodules.types import FrameTiming

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrameOptions:
    """Which frames of a clip are taken, and how large they may be.

    Args:
        num_frames: Frames per clip; the most that ``fps`` sampling takes.
        sampling: uniform (middles of equal stretches), segment (one of each stretch, at random in training) or fps.
        fps: Frames per second that ``fps`` sampling takes.
        max_pixels: Height x width that no frame exceeds; larger ones shrink, none grows.
        reader: auto takes decord where it is installed and PyAV where decord fails.

    Raises:
        ValueError: If a number is not positive, or fps sampling has no rate.
    """

    num_frames: int = 12
    sampling: Literal["uniform", "segment", "fps"] = "uniform"
    fps: float | None = None
    max_pixels: int | None = None
    reader: Literal["auto", "decord", "pyav"] = "auto"

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {self.num_frames}")
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ValueError(f"max_pixels must be at least 1, got {self.max_pixels}")
        if self.sampling == "fps" and not (self.fps and self.fps > 0):
            raise ValueError(f"sampling 'fps' needs a positive fps, got {self.fps}")


def read_frames(path: Path, options: FrameOptions, generator: torch.Generator | None = None) -> DecodedVideo:
    """Reads the sampled frames of one clip.

    Args:
        path: A video file, or a zip archive of pictures.
        options: How many frames, which, how large, and by which reader.
        generator: Jitters ``segment`` sampling; None takes the middle of each stretch.

    Raises:
        DecodeError: If no reader gets a single frame out of the file.
    """
    if not path.is_file():
        raise DecodeError(f"{path}: no such file")

    choose = _chooser(options, generator)
    if path.suffix.lower() == ".zip":
        return _read_zip(path, choose, options.max_pixels)
    decord = None if options.reader == "pyav" else _decord()
    if decord is None:
        if options.reader == "decord":
            raise DecodeError(f"{path}: reader 'decord' is asked for but not installed; use 'pyav' or 'auto'")
        _report("videos are read with PyAV")
        return read_with_pyav(path, choose, options.max_pixels)
    _report("videos are read with decord" + (", with PyAV where it fails" if options.reader == "auto" else ""))
    try:
        return _read_decord(decord, path, choose, options.max_pixels)
    except DecodeError as error:
        if options.reader == "decord":
            raise
        _LOG.debug("%s; reading it with PyAV", error)
        try:
            return read_with_pyav(path, choose, options.max_pixels)
        except DecodeError as second:
            raise DecodeError(f"{second}; {str(error).removeprefix(f'{path}: ')}") from error


def take_frames(frames: Tensor, fps: float, options: FrameOptions) -> DecodedVideo:
    """Samples frames that are in memory as ``read_frames`` samples those of a file.

    Args:
        frames: [T, 3, H, W] uint8, all frames of the video.
        fps: Their frames per second.
        options: How many frames, which, and how large.
    """
    indices = _chooser(options, None)(len(frames), fps)
    chosen = resize(frames[list(indices)], fit_size(frames.shape[2], frames.shape[3], options.max_pixels))
    return DecodedVideo(chosen.contiguous(), FrameTiming(fps, len(frames), indices), len(frames), "memory")


def _chooser(options: FrameOptions, generator: torch.Generator | None) -> FrameChooser:
    """Returns the sampling function with its options bound."""

    def choose(total: int, fps: float) -> tuple[int, ...]:
        if options.sampling == "segment":
            return segment_indices(total, options.num_frames, generator)
        if options.sampling == "fps" and options.fps is not None:
            return fps_indices(total, fps, options.fps, options.num_frames)
        return uniform_indices(total, options.num_frames)

    return choose


@cache
def _decord() -> ModuleType | None:
    """Imports decord on first use and silences its FFmpeg; returns None if it cannot be imported."""
    try:
        module = import_module("decord")
    except (ImportError, OSError):
        return None
    module.logging.set_level(module.logging.QUIET)
    return module


@cache
def _report(message: str) -> None:
    """Logs a message once per process."""
    _LOG.info(message)


def _read_decord(decord: Any, path: Path, choose: FrameChooser, max_pixels: int | None) -> DecodedVideo:
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        total, fps = len(reader), float(reader.get_avg_fps())
        if total == 0 or not (math.isfinite(fps) and fps > 0):
            raise DecodeError(f"{path}: decord: {total} frames at {fps} frames per second")
        times = reader.get_frame_timestamp(list(range(total)))[:, 0].tolist()
        shown = choose_by_time(choose, times, fps)
        pixels = reader.get_batch(list(shown.frames)).asnumpy()
    except (RuntimeError, decord.DECORDError, IndexError, OSError) as error:
        raise DecodeError(f"{path}: decord: {first_line(error)}") from error
    frames = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    frames = resize(frames, fit_size(frames.shape[2], frames.shape[3], max_pixels)).contiguous()
    return DecodedVideo(frames, FrameTiming(shown.fps, shown.total, shown.moments), total, "decord")


def _read_zip(path: Path, choose: FrameChooser, max_pixels: int | None) -> DecodedVideo:
    try:
        pictures = read_pictures(path, lambda total: choose(total, NOMINAL_FPS))
    except ValueError as error:
        raise DecodeError(f"{path}: {error}") from error
    size = fit_size(pictures.pictures[0].shape[1], pictures.pictures[0].shape[2], max_pixels)
    frames = torch.stack([resize(picture, size) for picture in pictures.pictures])
    timing = FrameTiming(NOMINAL_FPS, pictures.total, pictures.indices)
    return DecodedVideo(frames, timing, pictures.total, "zip", pictures.partial)
