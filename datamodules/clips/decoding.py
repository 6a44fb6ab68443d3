"""Decoding: reads the sampled frames of a file, with the reader that reads it correctly.

There are three readers. decord is fast in short files; it is used for plain ones if it is installed, since it returns
wrong frames of others without an error (torchcodec takes its place if it is asked for). PyAV reads everything else,
long videos, and what decord fails on. Pictures in an archive or a folder, and animated WebP, are read with Pillow.
decord and PyAV return the same frames, chosen by presentation time, so that variable frame rates are sampled evenly. A
reader is opened for each clip with one thread and not kept.

Nothing here imports torch: it runs in a helper process (``reading.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from vidreason.datamodules.clips.decoded import NOMINAL_FPS, DecodedFrames, DecodeError
from vidreason.datamodules.clips.decord_reader import decord, read_with_decord
from vidreason.datamodules.clips.pictures import is_picture_folder, read_animation, read_pictures
from vidreason.datamodules.clips.pyav_packets import Survey, survey
from vidreason.datamodules.clips.pyav_reader import Contents, can_pass_over, decode_completely, read_with_pyav
from vidreason.datamodules.clips.sampling import (
    FrameChooser,
    Stretch,
    fps_indices,
    segment_indices,
    uniform_indices,
)
from vidreason.datamodules.clips.torchcodec_reader import NotLoadedError, read_with_torchcodec

_LFS_POINTER = b"version https://git-lfs"
_WEBP = (b"RIFF", b"WEBP")


@dataclass(frozen=True)
class FrameOptions:
    """Options of the frames that are taken from a clip.

    Args:
        num_frames: Frames per clip; for ``fps`` sampling, the largest number.
        sampling: uniform (middles of equal segments), segment (one frame per segment, random in training) or fps.
        fps: Frames per second of ``fps`` sampling.
        max_pixels: Largest height x width of a frame; larger frames are shrunk, smaller ones stay.
        reader: auto uses decord for short files that it reads correctly, if it is installed, and PyAV for all others;
            torchcodec takes decord's place if it is named (``pip install 'vidreason[torchcodec]'``, and FFmpeg).
        timeout: Seconds that reading one clip may take; null sets no limit and reads in the same process.
        cache: Folder in which decoded frames are kept, for all processes and runs that name it; null keeps none.
        cache_gb: Size limit of that folder in GB of 1e9 bytes.
        cache_format: raw keeps frames as they are. jpeg takes less space and changes frames a little, in the
            same way whether they come from the cache or not.
        probe: Tests whether a model looks at the video: ``black`` blackens every frame, ``shuffled`` changes their
            order. For evaluation.

    Raises:
        ValueError: If a number is not positive, or fps sampling has no rate.
    """

    num_frames: int = 12
    sampling: Literal["uniform", "segment", "fps"] = "uniform"
    fps: float | None = None
    max_pixels: int | None = None
    reader: Literal["auto", "decord", "pyav", "torchcodec"] = "auto"
    timeout: float | None = field(default=30.0, repr=False)  # the text of the options identifies frames
    cache: str | None = field(default=None, repr=False)
    cache_gb: float = field(default=50.0, repr=False)
    cache_format: Literal["raw", "jpeg"] = "raw"
    probe: Literal["none", "black", "shuffled"] = "none"

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {self.num_frames}")
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ValueError(f"max_pixels must be at least 1, got {self.max_pixels}")
        if self.sampling == "fps" and not (self.fps and self.fps > 0):
            raise ValueError(f"sampling 'fps' needs a positive fps, got {self.fps}")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds or null, got {self.timeout}")
        if not self.cache_gb > 0:
            raise ValueError(f"cache_gb must be positive, got {self.cache_gb}; cache: null keeps no frames")

    @property
    def jittered_in_training(self) -> bool:
        """Returns whether training draws other frames of a clip in each epoch; such frames are never cached."""
        return self.sampling == "segment"


def decode(
    path: Path, options: FrameOptions, draws: Sequence[float] | None = None, stretch: Stretch | None = None
) -> DecodedFrames:
    """Reads the sampled frames of one clip in this process.

    Args:
        path: A video file, a zip archive of pictures, or a folder of pictures.
        options: Options of the frames.
        draws: [num_frames] random numbers in [0, 1), the jitter of ``segment`` sampling; None takes the middle of each
            segment.
        stretch: The part of a video that is read; None is all of it.

    Raises:
        DecodeError: If no reader can read any frame of the file.
    """
    choose = frame_chooser(options, draws)
    if path.is_dir():
        if not is_picture_folder(path):
            raise DecodeError(f"{path}: no such file (a folder without pictures)")
        return read_pictures(path, choose, options.max_pixels)
    _check_file(path)
    if path.suffix.lower() == ".zip":
        return read_pictures(path, choose, options.max_pixels)
    try:
        return _read_video(path, choose, options, stretch)
    except DecodeError:
        if not _is_webp(path):
            raise
        return read_animation(path, choose, options.max_pixels)


def decode_clip_completely(path: Path, reader: str) -> Contents:
    """Decodes every frame of a clip.

    Args:
        path: The clip.
        reader: What reads it, as ``DecodedFrames.reader`` says.

    Raises:
        DecodeError: If no frame can be decoded.
    """
    if reader != "pictures":
        return decode_completely(path)
    read = decode(path, FrameOptions(num_frames=10**6, sampling="fps", fps=NOMINAL_FPS, max_pixels=1))
    return Contents(read.frames_in_file, read.partial, 0)


def frame_chooser(options: FrameOptions, draws: Sequence[float] | None) -> FrameChooser:
    """Returns the sampling function with its options bound."""

    def choose(total: int, fps: float) -> tuple[int, ...]:
        if options.sampling == "segment":
            return segment_indices(total, options.num_frames, draws)
        if options.sampling == "fps" and options.fps is not None:
            return fps_indices(total, fps, options.fps, options.num_frames)
        return uniform_indices(total, options.num_frames)

    return choose


def _read_video(path: Path, choose: FrameChooser, options: FrameOptions, stretch: Stretch | None) -> DecodedFrames:
    found = survey(path, stretch)
    why = _why_pyav(found.oddity, options.reader, stretch)
    if not why and options.reader == "auto" and can_pass_over(found, options.num_frames):
        why = "PyAV passes over frames to which no other refers"
    if options.reader == "decord":
        if why:
            raise DecodeError(f"{path}: reader 'decord': {why}; use 'pyav' or 'auto'")
        return _read_plain(path, choose, options, found)
    if not why:
        try:
            return _read_plain(path, choose, options, found)
        except NotLoadedError:
            raise
        except DecodeError as error:
            why = str(error).removeprefix(f"{path}: ")
    try:
        return replace(read_with_pyav(path, choose, options.max_pixels, found, stretch), why=why)
    except DecodeError as error:
        raise DecodeError(f"{error}; {why}" if why.startswith(("decord: ", "torchcodec: ")) else str(error)) from error


def _read_plain(path: Path, choose: FrameChooser, options: FrameOptions, found: Survey) -> DecodedFrames:
    read = read_with_torchcodec if options.reader == "torchcodec" else read_with_decord
    try:
        return read(path, choose, options.max_pixels, found)
    except DecodeError as error:
        raise type(error)(f"{path}: {error}") from error


def _why_pyav(oddity: str, asked: str, stretch: Stretch | None) -> str:
    """Returns the reason for using PyAV and not decord or torchcodec, or an empty string."""
    if asked == "pyav":
        return "asked for"
    other = "torchcodec" if asked == "torchcodec" else "decord"
    if other == "decord" and decord() is None:
        return "decord is not installed"
    if oddity:
        return f"{other} may return wrong frames: {oddity}"
    return "" if stretch is None else f"{other} reads the whole file for a part of it"


def _check_file(path: Path) -> None:
    """Checks for files that readers only report as invalid, or that block: missing, a pipe, empty, a Git LFS pointer.

    Raises:
        DecodeError: If the file is one of these.
    """
    if not path.is_file():
        raise DecodeError(f"{path}: not an ordinary file" if path.exists() else f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if not start:
        raise DecodeError(f"{path}: the file is empty")
    if start == _LFS_POINTER:
        raise DecodeError(f"{path}: a Git LFS pointer and not the clip: run `git lfs pull` in its repository")


def _is_webp(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(12)
    return (head[:4], head[8:]) == _WEBP
