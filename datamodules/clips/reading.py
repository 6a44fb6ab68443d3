"""Reading of clips within a time limit, from the cache of frames or in a helper process."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vidreason.datamodules.clips.decoded import DecodedFrames, DecodedVideo, fit_size, resize
from vidreason.datamodules.clips.decoding import FrameOptions, decode, frame_chooser
from vidreason.datamodules.clips.decord_reader import decord
from vidreason.datamodules.clips.frame_cache import as_jpeg, entry_key, frame_cache, from_jpeg
from vidreason.datamodules.clips.sampling import Stretch
from vidreason.datamodules.clips.time_limit import ReadTimeoutError, call_reader
from vidreason.datamodules.clips.torchcodec_reader import LOAD_TIMEOUT, load_torchcodec
from vidreason.datamodules.file_hash import clip_version, content_sha
from vidreason.datamodules.types import FrameTiming

_LOG = logging.getLogger(__name__)


def read_frames(
    path: Path,
    options: FrameOptions,
    generator: torch.Generator | None = None,
    stretch: Stretch | None = None,
) -> DecodedVideo:
    """Reads the sampled frames of one clip, from the cache of ``options`` if they are there.

    Frames with jitter, and those of a damaged file (which may only have been read badly), are not cached.

    Args:
        path: A video file, a zip archive of pictures, or a folder of pictures.
        options: Options of the frames, among them the time limit and the cache.
        generator: Source of the jitter of ``segment`` sampling; None takes the middle of each segment.
        stretch: The part of a video that is read; None is all of it.

    Raises:
        DecodeError: If no reader can read any frame of the file within the time limit.
    """
    _report(options.reader)
    if generator is not None and options.sampling == "segment":
        draws = torch.rand(options.num_frames, generator=generator, dtype=torch.float64).tolist()
        return _decoded(path, options, draws, stretch)[0]
    content = content_of(path, options) if options.cache is not None else ""
    if not content or options.cache is None:
        return _decoded(path, options, None, stretch)[0]
    cache, key = frame_cache(options.cache, options.cache_gb), entry_key(content, options, stretch)
    found = cache.read(key)
    if found is None:
        found, encoded = _decoded(path, options, None, stretch)
        if not found.partial and content_of(path, options) == content:  # not replaced meanwhile
            cache.write(key, found, encoded)
    return found


def content_of(path: Path, options: FrameOptions) -> str:
    """Returns the hash of a file; a process hashes an unchanged file once.

    Returns:
        An empty text if there is no file or folder, or hashing takes longer than the time limit.

    Raises:
        DecodeError: If the file system does not answer within the time limit.
    """
    path = path.absolute()
    try:
        version = call_reader(clip_version, path, timeout=options.timeout)
        if version is None:
            return ""
        known = _contents.get(path)
        if known is None or known.version != version:
            known = _contents[path] = _Content(version, _hash_in_time(path, options))
    except FileNotFoundError:  # it has just vanished
        return ""
    return known.sha


class _Content(NamedTuple):
    version: str
    """``file_version`` of the file that was hashed."""
    sha: str
    """Empty if that took too long."""


def _hash_in_time(path: Path, options: FrameOptions) -> str:
    """Returns the hash of a file; empty if that takes too long, as for hours of video on a slow network disk."""
    try:
        return call_reader(content_sha, path, timeout=options.timeout)
    except ReadTimeoutError as error:
        _LOG.warning("%s, so that nothing about it is cached; raise frames.timeout", error)
        return ""


_contents: dict[Path, _Content] = {}


def forget_contents() -> None:
    """Forgets the hashes of files, so that the next read is like the first of a process."""
    _contents.clear()


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
    taken = pixels.permute(0, 3, 1, 2).contiguous()
    if options.cache_format == "jpeg":
        taken = from_jpeg(as_jpeg(taken))
    return DecodedVideo(taken, FrameTiming(fps, len(frames), indices), len(frames), "memory")


def _decoded(
    path: Path, options: FrameOptions, draws: Sequence[float] | None, stretch: Stretch | None
) -> tuple[DecodedVideo, list[bytes] | None]:
    """Decodes a clip; returns its frames, and each as JPEG if the options ask for this format."""
    if options.reader == "torchcodec":
        call_reader(load_torchcodec, path, timeout=None if options.timeout is None else LOAD_TIMEOUT)
    read = _as_video(call_reader(decode, path, options, draws, stretch, timeout=options.timeout))
    if options.cache_format == "raw":
        return read, None
    encoded = as_jpeg(read.frames)
    return replace(read, frames=from_jpeg(encoded)), encoded


def _as_video(read: DecodedFrames) -> DecodedVideo:
    frames = torch.from_numpy(read.pixels).permute(0, 3, 1, 2).contiguous()
    timing = FrameTiming(read.fps, read.total, read.indices)
    return DecodedVideo(frames, timing, read.frames_in_file, read.reader, read.partial)


@cache
def _report(reader: str) -> None:
    """Logs once per process which libraries read videos."""
    with_both = {
        "auto": "decord, and with PyAV where decord fails or is slower",
        "torchcodec": "torchcodec, and with PyAV where torchcodec fails",
        "decord": "decord",
    }
    alone = reader == "pyav" or (reader == "auto" and decord() is None)
    _LOG.info("videos are read with %s", "PyAV" if alone else with_both[reader])
