"""Reads videos with decord, which is fast. It may return wrong frames without an error, so it is used for plain files.

Which files are plain is decided from their packets (``pyav_packets.py``); and the times that decord gives to the frames
have to be those of the packets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np

from vidreason.datamodules.clips.decoded import DecodedFrames, DecodeError, Pixels, first_line, fit_size, resize
from vidreason.datamodules.clips.pyav_packets import TIME_SLACK, Survey
from vidreason.datamodules.clips.sampling import FrameChooser, choose_by_time

_BYTES_AT_ONCE = 64 * 10**6


@cache
def decord() -> ModuleType | None:
    """Imports decord on first use and silences its FFmpeg; returns None if it cannot be imported."""
    try:
        module = import_module("decord")
    except (ImportError, OSError):
        return None
    module.logging.set_level(module.logging.QUIET)
    return module


def read_with_decord(path: Path, choose: FrameChooser, max_pixels: int | None, found: Survey) -> DecodedFrames:
    """Decodes the chosen frames of a video; the message of an error does not name the file.

    Raises:
        DecodeError: If decord fails, or finds other frames than the packets have.
    """
    module = decord()
    assert module is not None
    try:
        reader = module.VideoReader(str(path), num_threads=1)
        total, fps = len(reader), float(reader.get_avg_fps())
        # Timestamps are [total, 2]: start and end of each frame in seconds.
        times = reader.get_frame_timestamp(list(range(total)))[:, 0].tolist() if total else []
        if not _alike(times, found.times):
            raise DecodeError(f"decord: finds {total} frames, with other times than the {found.packets} packets have")
        if not (math.isfinite(fps) and fps > 0):
            raise DecodeError(f"decord: {total} frames at {fps} frames per second")
        shown = choose_by_time(choose, found.times, found.fps)
        pixels, size = frames_in_batches(lambda some: reader.get_batch(list(some)).asnumpy(), shown.frames, max_pixels)
    except (RuntimeError, module.DECORDError, IndexError, OSError) as error:
        raise DecodeError(f"decord: {first_line(error)}") from error
    return DecodedFrames(pixels, shown.fps, shown.total, shown.moments, total, "decord", size=size)


def _alike(times: Sequence[float], others: Sequence[float]) -> bool:
    """Returns whether times in seconds are equal, from the first one on."""
    if len(times) != len(others) or not times:
        return False
    return np.allclose(np.subtract(times, times[0]), np.subtract(others, others[0]), rtol=0, atol=TIME_SLACK)


def frames_in_batches(
    take: Callable[[Sequence[int]], Pixels], indices: Sequence[int], max_pixels: int | None
) -> tuple[Pixels, tuple[int, int]]:
    """Returns the frames [T, H, W, 3], and the width and height that they had.

    They are decoded and resized a few at a time, so that few are in memory at full size.

    Args:
        take: Decodes the frames with the given positions.
        indices: [T] positions.
        max_pixels: Largest height x width of a frame.
    """
    done: list[Pixels] = []
    first, count = 0, 1
    height = width = 0
    while first < len(indices):
        batch = take(indices[first : first + count])
        height, width = batch.shape[1:3]
        done += [resize(frame, fit_size(height, width, max_pixels)) for frame in batch]
        first += count
        count = max(1, _BYTES_AT_ONCE // max(batch[0].nbytes, 1))
    return np.stack(done), (width, height)
