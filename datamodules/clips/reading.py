"""Reading of clips within a time limit, in a helper process: this is how all parts of the program open a clip."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vidreason.datamodules.clips import helper_process
from vidreason.datamodules.clips.decoded import DecodedFrames, DecodedVideo, DecodeError, fit_size, resize
from vidreason.datamodules.clips.decoding import FrameOptions, decode, frame_chooser
from vidreason.datamodules.clips.decord_reader import decord
from vidreason.datamodules.clips.sampling import Stretch
from vidreason.datamodules.types import FrameTiming

T = TypeVar("T")
_LOG = logging.getLogger(__name__)


class ReadStoppedError(DecodeError):
    """Raised for a clip that was being read when the run was stopped by a signal."""


class ReadTimeoutError(DecodeError):
    """Raised for a clip that is not read within the time limit."""


def read_frames(
    path: Path,
    options: FrameOptions,
    generator: torch.Generator | None = None,
    stretch: Stretch | None = None,
) -> DecodedVideo:
    """Reads the sampled frames of one clip.

    Args:
        path: A video file, a zip archive of pictures, or a folder of pictures.
        options: Options of the frames, among them the time limit.
        generator: Source of the jitter of ``segment`` sampling; None takes the middle of each segment.
        stretch: The part of a video that is read; None is all of it.

    Raises:
        DecodeError: If no reader can read any frame of the file within the time limit.
    """
    _report(options.reader)
    draws = None
    if generator is not None and options.sampling == "segment":
        draws = torch.rand(options.num_frames, generator=generator, dtype=torch.float64).tolist()
    return _as_video(call_reader(decode, path, options, draws, stretch, timeout=options.timeout))


def call_reader(function: Callable[..., T], path: Path, *args: Any, timeout: float | None) -> T:
    """Calls a function that opens a clip, in a helper process.

    Args:
        function: A function of a module that does not import torch; its first argument is the path.
        path: The clip.
        args: Further arguments.
        timeout: Seconds that it may take; None calls it in this process.

    Raises:
        DecodeError: If it takes longer or crashes, or has raised one.
    """
    if timeout is None or os.name == "nt":
        return function(path, *args)
    try:
        return helper_process.call(function, path, *args, timeout=timeout)
    except helper_process.StoppedError as error:
        raise ReadStoppedError(f"{path}: {error}") from error
    except helper_process.TimeLimitError as error:
        raise ReadTimeoutError(f"{path}: {error}") from error
    except helper_process.HelperError as error:
        raise DecodeError(f"{path}: {error}") from error
    except MemoryError as error:
        raise DecodeError(f"{path}: not enough memory") from error


def take_frames(frames: Tensor, fps: float, options: FrameOptions) -> DecodedVideo:
    """Samples frames that are in memory as ``read_frames`` samples those of a file.

    Args:
        frames: [T, 3, H, W] uint8, all frames of the video.
        fps: Frames per second of the video.
        options: Options of the frames.
    """
    indices = frame_chooser(options, None)(len(frames), fps)
    size = fit_size(frames.shape[2], frames.shape[3], options.max_pixels)
    chosen = frames[list(indices)].permute(0, 2, 3, 1).numpy()
    pixels = torch.stack([torch.from_numpy(resize(frame, size).copy()) for frame in chosen])
    timing = FrameTiming(fps, len(frames), indices)
    return DecodedVideo(pixels.permute(0, 3, 1, 2).contiguous(), timing, len(frames), "memory")


def _as_video(read: DecodedFrames) -> DecodedVideo:
    frames = torch.from_numpy(read.pixels).permute(0, 3, 1, 2).contiguous()
    timing = FrameTiming(read.fps, read.total, read.indices)
    return DecodedVideo(frames, timing, read.frames_in_file, read.reader, read.partial)


@cache
def _report(reader: str) -> None:
    """Logs once per process which libraries read videos."""
    if reader == "pyav" or decord() is None:
        _LOG.info("videos are read with PyAV")
    else:
        _LOG.info("videos are read with decord" + (", and with PyAV where decord fails" if reader == "auto" else ""))
