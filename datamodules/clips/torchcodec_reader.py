"""Reads videos with torchcodec, which is an optional extra and needs the libraries of an installed FFmpeg.

It reads the same plain files as decord. Importing it imports torch, which takes seconds; the helper process does so
only if this reader is asked for.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from vidreason.datamodules.clips.decoded import DecodedFrames, DecodeError, Pixels, first_line
from vidreason.datamodules.clips.decord_reader import frames_in_batches
from vidreason.datamodules.clips.pyav_packets import TIME_SLACK, Survey
from vidreason.datamodules.clips.sampling import FrameChooser, choose_by_time

if TYPE_CHECKING:
    from collections.abc import Sequence

_NO_FFMPEG = "torchcodec: cannot load the libraries of FFmpeg: install FFmpeg, or set frames.reader to auto"
LOAD_TIMEOUT = 120.0
"""Seconds that :func:`load_torchcodec` may take on a machine under load."""


class NotLoadedError(DecodeError):
    """Raised if torchcodec or FFmpeg is missing, which is the same for all clips."""


def load_torchcodec(path: Path) -> None:
    """Imports torchcodec, so that the time limit of a clip does not count it.

    Args:
        path: The clip that is to be read, for messages.

    Raises:
        NotLoadedError: If it is not installed.
    """
    try:
        _decoders()
    except NotLoadedError as error:
        raise NotLoadedError(f"{path}: {error}") from error


def read_with_torchcodec(path: Path, choose: FrameChooser, max_pixels: int | None, found: Survey) -> DecodedFrames:
    """Decodes the chosen frames of a video; the message of an error does not name the file.

    Raises:
        NotLoadedError: If torchcodec or FFmpeg is missing.
        DecodeError: If decoding fails, or other frames are found than the packets have.
    """
    decoders = _decoders()
    shown = choose_by_time(choose, found.times, found.fps)
    try:
        reader = decoders.VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        total = int(reader.metadata.num_frames or 0)
        if total != len(found.times):
            raise DecodeError(f"torchcodec: finds {total} frames, and there are {found.packets} packets")

        def take(indices: Sequence[int]) -> Pixels:
            batch = reader.get_frames_at(indices=list(indices))
            times = [found.times[index] for index in indices]
            if any(abs(own - time) > TIME_SLACK for own, time in zip(batch.pts_seconds.tolist(), times, strict=True)):
                raise DecodeError("torchcodec: finds frames with other times than the packets have")
            pixels: Pixels = batch.data.numpy()
            return pixels

        pixels, size = frames_in_batches(take, shown.frames, max_pixels)
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        if isinstance(error, DecodeError):
            raise
        if "Could not load libtorchcodec" in str(error):
            raise NotLoadedError(_NO_FFMPEG) from error
        raise DecodeError(f"torchcodec: {first_line(error)}") from error
    return DecodedFrames(pixels, shown.fps, shown.total, shown.moments, total, "torchcodec", size=size)


def _decoders() -> ModuleType:
    try:
        return import_module("torchcodec.decoders")
    except ImportError as error:
        raise NotLoadedError(
            f"torchcodec: {first_line(error)}: pip install 'vidreason[torchcodec]', or set frames.reader to auto"
        ) from error
    except RuntimeError as error:  # earlier versions load FFmpeg when they are imported
        raise NotLoadedError(_NO_FFMPEG) from error
