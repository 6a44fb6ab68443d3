"""The length and size of clips, read without decoding: from the manifest, or from the header of the file."""

from __future__ import annotations

import logging
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from vidreason.datamodules.clips.decoded import NOMINAL_FPS, DecodeError, fit_size
from vidreason.datamodules.clips.decoding import FrameOptions, frame_chooser
from vidreason.datamodules.clips.pictures import is_picture_folder, open_picture, picture_names
from vidreason.datamodules.clips.pyav_packets import open_video, video_stream
from vidreason.datamodules.clips.time_limit import ReadTimeoutError, call_for_files

if TYPE_CHECKING:  # imports torch, and the helper process reads headers
    from vidreason.datamodules.types import Clip, FrameTiming

_LOG = logging.getLogger(__name__)

COLUMNS = ("clip_frames", "clip_fps", "clip_width", "clip_height")
"""Columns of a manifest of ``vidreason init`` with the measurements of a clip."""


@dataclass(frozen=True)
class ClipHeader:
    """Length and size of a clip."""

    frames: int
    fps: float
    """Frames per second."""
    width: int
    """Width in pixels; before rotation, if it was read from a file."""
    height: int

    def timing(self, options: FrameOptions) -> FrameTiming:
        """Returns the frames that are sampled, as if all were shown equally long."""
        from vidreason.datamodules.types import FrameTiming

        return FrameTiming(self.fps, self.frames, frame_chooser(options, None)(self.frames, self.fps))

    def size(self, options: FrameOptions) -> tuple[int, int]:
        """Returns height and width of a sampled frame."""
        return fit_size(self.height, self.width, options.max_pixels)


def read_headers(clips: Sequence[Clip], timeout: float | None) -> list[ClipHeader | None]:
    """Returns length and size of clips; None if neither the columns of a clip nor its file tell them.

    A file without a frame count is as long as its duration times its frame rate. A part of a video has its own length.
    If a file does not answer, the files behind it are not looked at, which is reported: clips are read later anyway,
    each within its own time limit.

    Args:
        clips: The clips.
        timeout: Seconds that a few headers may take; None sets no limit.
    """
    told = {clip.path: header for clip in clips if (header := _from_columns(clip)) is not None}
    paths = list(dict.fromkeys(clip.path for clip in clips if clip.path not in told))
    found: dict[Path, ClipHeader | None] = dict(told)
    try:
        for path, header in zip(paths, call_for_files(header_of, paths, timeout, at_once=16), strict=True):
            found[path] = header
    except ReadTimeoutError as error:
        _LOG.warning("%s; the headers of %d files are not looked at", error, len(told) + len(paths) - len(found))
    return [_of_stretch(clip, found.get(clip.path)) for clip in clips]


def header_of(path: Path) -> ClipHeader | None:
    """Returns length and size of the clip in a file or folder; None if it does not tell them."""
    try:
        if path.is_dir():
            return _folder_header(path)
        if not path.is_file():  # opening a pipe would block
            return None
        found = _zip_header(path) if path.suffix.lower() == ".zip" else _video_header(path)
    except (DecodeError, OSError, ValueError, zipfile.BadZipFile):
        return None
    return found if found.frames > 0 and found.fps > 0 and found.width * found.height > 0 else None


def _from_columns(clip: Clip) -> ClipHeader | None:
    """Returns length and size of the file of a clip by the columns that ``vidreason init`` writes."""
    try:
        frames, fps, width, height = (float(clip.fields[name]) for name in COLUMNS)
    except (KeyError, ValueError):
        return None
    return ClipHeader(int(frames), fps, int(width), int(height))


def _of_stretch(clip: Clip, whole: ClipHeader | None) -> ClipHeader | None:
    if whole is None or clip.stretch is None:
        return whole
    seconds = clip.stretch.end - clip.stretch.start
    if not math.isfinite(seconds):
        seconds = whole.frames / whole.fps - clip.stretch.start
    return replace(whole, frames=max(1, round(min(seconds, whole.frames / whole.fps) * whole.fps)))


def _video_header(path: Path) -> ClipHeader:
    with open_video(path) as container:
        stream = video_stream(container, path)
        rate = stream.average_rate or stream.guessed_rate or Fraction(1)
        frames = stream.frames
        if not frames and stream.duration is not None and stream.time_base is not None:
            frames = round(stream.duration * stream.time_base * rate)
        if not frames and container.duration is not None:
            frames = round(container.duration * rate / 1_000_000)  # in microseconds
        return ClipHeader(frames, float(rate), stream.width, stream.height)


def _zip_header(path: Path) -> ClipHeader:
    with zipfile.ZipFile(path) as archive:
        names = picture_names(archive.namelist())
        if not names:
            raise ValueError(f"{path}: no picture")
        with open_picture(BytesIO(archive.read(names[0]))) as picture:
            return ClipHeader(len(names), NOMINAL_FPS, picture.width, picture.height)


def _folder_header(path: Path) -> ClipHeader | None:
    if not is_picture_folder(path):
        return None
    names = picture_names([entry.name for entry in path.iterdir()])
    with open_picture(path / names[0]) as picture:
        return ClipHeader(len(names), NOMINAL_FPS, picture.width, picture.height)
