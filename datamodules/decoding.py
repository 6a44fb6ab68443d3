"""From a file to frames; the only file that imports a decoder.

Two readers stand behind one function. decord is fast and the default where it is installed; PyAV reads what decord
cannot (AV1, GIF, files that are damaged or cut in half) and is always there. On sound files both give the same frames.
Readers are opened per clip with one thread and never kept, so that worker processes may be forked or spawned.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import av
import numpy as np
import torch
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from vidreason.datamodules.frame_zip import NOMINAL_FPS, read_pictures
from vidreason.datamodules.sampling import fps_indices, segment_indices, uniform_indices
from vidreason.datamodules.types import FrameTiming

_LOG = logging.getLogger(__name__)
_PYAV_ERRORS = (av.FFmpegError, OSError)
_Chooser = Callable[[int, float], tuple[int, ...]]
"""(frames in the file, its frames per second) -> positions to take"""


class DecodeError(ValueError):
    """A clip that cannot be read; the message names its path and what each reader said."""


@dataclass(frozen=True)
class FrameOptions:
    """Which frames of a clip are taken, and how large they may be.

    Args:
        num_frames: frames per clip; the most that ``fps`` sampling takes.
        sampling: uniform (middles of equal stretches), segment (one of each stretch, at random in training) or fps.
        fps: frames per second that ``fps`` sampling takes.
        max_pixels: height x width that no frame exceeds; larger ones shrink, none grows.
        reader: auto takes decord where it is installed and PyAV where decord fails.

    Raises:
        ValueError: for numbers that are not positive, or fps sampling without a rate.
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


@dataclass(frozen=True)
class DecodedVideo:
    """The sampled frames of one clip."""

    frames: Tensor
    """[T, 3, H, W] uint8"""
    timing: FrameTiming
    reader: str
    """decord, pyav, zip or memory"""
    partial: bool = False
    """True where parts of the file could not be read."""


def read_frames(path: Path, options: FrameOptions, generator: torch.Generator | None = None) -> DecodedVideo:
    """Reads the sampled frames of one clip.

    Args:
        path: a video file, or a zip archive of pictures.
        options: how many frames, which, how large, and by which reader.
        generator: jitters ``segment`` sampling; None takes the middle of each stretch.

    Raises:
        DecodeError: where no reader gets a single frame out of the file.
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
        return _read_pyav(path, choose, options.max_pixels)
    _report("videos are read with decord" + (", with PyAV where it fails" if options.reader == "auto" else ""))
    try:
        return _read_decord(decord, path, choose, options.max_pixels)
    except DecodeError as error:
        if options.reader == "decord":
            raise
        _LOG.debug("%s; reading it with PyAV", error)
        try:
            return _read_pyav(path, choose, options.max_pixels)
        except DecodeError as second:
            raise DecodeError(f"{second}; {str(error).removeprefix(f'{path}: ')}") from error


def take_frames(frames: Tensor, fps: float, options: FrameOptions) -> DecodedVideo:
    """Samples frames that are in memory as ``read_frames`` samples those of a file.

    Args:
        frames: [T, 3, H, W] uint8, all frames of the video.
        fps: their frames per second.
        options: how many frames, which, and how large.
    """
    indices = _chooser(options, None)(len(frames), fps)
    chosen = _resize(frames[list(indices)], fit_size(frames.shape[2], frames.shape[3], options.max_pixels))
    return DecodedVideo(chosen.contiguous(), FrameTiming(fps, len(frames), indices), "memory")


def _chooser(options: FrameOptions, generator: torch.Generator | None) -> _Chooser:
    """Joins the sampling function to its options."""

    def choose(total: int, fps: float) -> tuple[int, ...]:
        if options.sampling == "segment":
            return segment_indices(total, options.num_frames, generator)
        if options.sampling == "fps" and options.fps is not None:
            return fps_indices(total, fps, options.fps, options.num_frames)
        return uniform_indices(total, options.num_frames)

    return choose


def fit_size(height: int, width: int, max_pixels: int | None) -> tuple[int, int]:
    """The size within a pixel budget, aspect kept; the size itself where it already fits.

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


def _resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., 3, H, W] uint8 to the given size; the same tensor where it already has it."""
    if tuple(frames.shape[-2:]) == size:
        return frames
    resized: Tensor = vision.resize(frames, list(size), antialias=True)
    return resized


@cache
def _decord() -> ModuleType | None:
    """Imports decord on first use and silences its FFmpeg; None where it is not installed or does not load."""
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


def _read_decord(decord: Any, path: Path, choose: _Chooser, max_pixels: int | None) -> DecodedVideo:
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        total, fps = len(reader), float(reader.get_avg_fps())
        if total == 0 or not (math.isfinite(fps) and fps > 0):
            raise DecodeError(f"{path}: decord: {total} frames at {fps} frames per second")
        indices = choose(total, fps)
        pixels = reader.get_batch(list(indices)).asnumpy()
    except (RuntimeError, decord.DECORDError, IndexError, OSError) as error:
        raise DecodeError(f"{path}: decord: {_first_line(error)}") from error
    frames = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    frames = _resize(frames, fit_size(frames.shape[2], frames.shape[3], max_pixels)).contiguous()
    return DecodedVideo(frames, FrameTiming(fps, total, indices), "decord")


def _read_pyav(path: Path, choose: _Chooser, max_pixels: int | None) -> DecodedVideo:
    """Decodes front to back, which no damaged index can mislead, and keeps the chosen frames alone."""
    total, fps = _survey(path)
    indices = choose(total, fps)
    scan = _scan(path, frozenset(indices), max_pixels)
    if scan.total != total and scan.total > 0:  # a damaged file has fewer frames than packets: choose among the frames
        total, indices = scan.total, choose(scan.total, fps)
        scan = _scan(path, frozenset(indices), max_pixels)
    missing = [index for index in indices if index not in scan.frames]
    if missing:
        raise DecodeError(f"{path}: PyAV: {scan.total} frames can be decoded (the file is damaged or encrypted)")
    frames = torch.stack([scan.frames[index] for index in indices])
    return DecodedVideo(frames, FrameTiming(fps, total, indices), "pyav", scan.partial)


@dataclass(frozen=True)
class _Scan:
    """What one pass over a file found."""

    total: int
    frames: dict[int, Tensor]
    partial: bool


def _survey(path: Path) -> tuple[int, float]:
    """Counts the packets, since a header's frame count may be 0 or wrong, and finds the frame rate; decodes nothing."""
    times: list[Fraction] = []
    count = 0
    with _open(path) as container:
        stream = _video_stream(container, path)
        rate = stream.average_rate or stream.guessed_rate
        for packet in _packets(container, stream):
            if packet is None or packet.size == 0:
                continue
            count += 1
            if packet.pts is not None and packet.time_base is not None:
                times.append(packet.pts * packet.time_base)
    if count == 0:
        raise DecodeError(f"{path}: PyAV: the video stream is empty")
    if not rate and len(times) > 1 and max(times) > min(times):
        rate = (len(times) - 1) / (max(times) - min(times))
    return count, float(rate) if rate else 1.0


def _scan(path: Path, wanted: frozenset[int], max_pixels: int | None) -> _Scan:
    """Decodes everything, packet by packet, and converts the wanted frames."""
    frames: dict[int, Tensor] = {}
    size: tuple[int, int] | None = None
    total, partial = 0, False
    with _open(path) as container:
        stream = _video_stream(container, path)
        stream.thread_type, stream.thread_count = "NONE", 1
        for packet in _packets(container, stream):
            try:
                decoded = stream.decode(packet)
            except _PYAV_ERRORS:
                partial = True
                continue
            partial = partial or packet is None
            for frame in decoded:
                if total in wanted:
                    pixels = _upright(frame)
                    size = size or fit_size(pixels.shape[1], pixels.shape[2], max_pixels)
                    frames[total] = _resize(pixels, size)
                total += 1
    return _Scan(total, frames, partial)


def _open(path: Path) -> InputContainer:
    try:
        return av.open(str(path), metadata_errors="ignore")
    except _PYAV_ERRORS as error:
        raise DecodeError(f"{path}: PyAV: {_first_line(error)}") from error


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    """The stream that FFmpeg thinks best; cover art is not a video."""
    moving = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not moving:
        raise DecodeError(f"{path}: PyAV: the file has no video stream")
    best = container.streams.best("video")
    return next((stream for stream in moving if best is not None and stream.index == best.index), moving[0])


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream] | None]:
    """The packets of a stream, the flushing one last; None stands for the rest of a file that is cut off."""
    demux = container.demux(stream)
    while True:
        try:
            packet = next(demux)
        except StopIteration:
            return
        except _PYAV_ERRORS:
            yield None
            return
        yield packet


def _upright(frame: VideoFrame) -> Tensor:
    """[3, H, W] uint8, turned as the display matrix says."""
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90) % 4)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).contiguous()


def _read_zip(path: Path, choose: _Chooser, max_pixels: int | None) -> DecodedVideo:
    try:
        pictures = read_pictures(path, lambda total: choose(total, NOMINAL_FPS))
    except ValueError as error:
        raise DecodeError(f"{path}: {error}") from error
    size = fit_size(pictures.pictures[0].shape[1], pictures.pictures[0].shape[2], max_pixels)
    frames = torch.stack([_resize(picture, size) for picture in pictures.pictures])
    return DecodedVideo(frames, FrameTiming(NOMINAL_FPS, pictures.total, pictures.indices), "zip", pictures.partial)


def _first_line(error: BaseException) -> str:
    """One line of a message that may be a stack trace in C++."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
