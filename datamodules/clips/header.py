"""The length and size of clips, read without decoding: from the manifest, or from the header of the file."""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass, replace
from fractions import Fraction
from io import BytesIO
from pathlib import Path

from PIL import Image

from vidreason.datamodules.clips.decoded import NOMINAL_FPS, DecodeError, fit_size
from vidreason.datamodules.clips.decoding import FrameOptions, frame_chooser
from vidreason.datamodules.clips.pictures import is_picture_folder, picture_names
from vidreason.datamodules.clips.pyav_packets import open_video, video_stream
from vidreason.datamodules.types import Clip, FrameTiming

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
        return FrameTiming(self.fps, self.frames, frame_chooser(options, None)(self.frames, self.fps))

    def size(self, options: FrameOptions) -> tuple[int, int]:
        """Returns height and width of a sampled frame."""
        return fit_size(self.height, self.width, options.max_pixels)


def read_header(clip: Clip) -> ClipHeader | None:
    """Returns length and size of a clip; None if neither its columns nor its file tell them.

    A file without a frame count is as long as its duration times its frame rate. A part of a video has its own length.
    """
    found = _whole(clip)
    if found is None or clip.stretch is None:
        return found
    seconds = clip.stretch.end - clip.stretch.start
    if not math.isfinite(seconds):
        seconds = found.frames / found.fps - clip.stretch.start
    return replace(found, frames=max(1, round(min(seconds, found.frames / found.fps) * found.fps)))


def _whole(clip: Clip) -> ClipHeader | None:
    """Returns length and size of the file of a clip."""
    if all(clip.fields.get(name) for name in COLUMNS):
        try:
            frames, fps, width, height = (float(clip.fields[name]) for name in COLUMNS)
        except ValueError:
            return None
        return ClipHeader(int(frames), fps, int(width), int(height))
    try:
        if clip.path.is_dir():
            return _folder_header(clip.path)
        found = _zip_header(clip.path) if clip.path.suffix.lower() == ".zip" else _video_header(clip.path)
    except (DecodeError, OSError, ValueError, zipfile.BadZipFile):
        return None
    return found if found.frames > 0 and found.fps > 0 and found.width * found.height > 0 else None


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
        with Image.open(BytesIO(archive.read(names[0]))) as picture:
            return ClipHeader(len(names), NOMINAL_FPS, picture.width, picture.height)


def _folder_header(path: Path) -> ClipHeader | None:
    if not is_picture_folder(path):
        return None
    names = picture_names([entry.name for entry in path.iterdir()])
    with Image.open(path / names[0]) as picture:
        return ClipHeader(len(names), NOMINAL_FPS, picture.width, picture.height)
