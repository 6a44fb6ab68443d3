"""Reads videos with PyAV.

A short video, or a damaged one, is decoded from the first to the last packet, so that damaged packets are skipped and
a damaged index does no harm. In a long one, the reader seeks to the key frames before the chosen frames and passes over
frames to which no other refers (the B frames of most encoders). It decodes everything if the frames
that it finds do not have the times that the packets have.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from vidreason.datamodules.clips.decoded import (
    DecodedFrames,
    DecodeError,
    Pixels,
    check_frame_size,
    fit_size,
    resize,
)
from vidreason.datamodules.clips.pyav_packets import (
    PYAV_ERRORS,
    TIME_SLACK,
    Survey,
    open_video,
    packets_of,
    seconds,
    seek_before,
    video_stream,
    within,
)
from vidreason.datamodules.clips.sampling import FrameChooser, ShownFrames, Stretch, choose_by_time

_WORTH_A_SEEK = 60  # frames that need not be decoded


def read_with_pyav(
    path: Path, choose: FrameChooser, max_pixels: int | None, found: Survey, stretch: Stretch | None = None
) -> DecodedFrames:
    """Decodes the chosen frames of a video, or of a stretch of it.

    Args:
        path: The video.
        choose: Chooses among the frames.
        max_pixels: Largest height x width of a frame.
        found: Its packets, or those of the stretch.
        stretch: The part of the video; None is all of it.

    Raises:
        DecodeError: If the chosen frames cannot be decoded.
    """
    if found.times and all(before < after for before, after in pairwise(found.times)):
        first, last = within(found.times, found.origin, stretch, path)
        shown = choose_by_time(choose, found.times[first:last], found.fps)
        saved = _frames_saved(found, [first + index for index in shown.frames])
        if stretch is not None or saved > _WORTH_A_SEEK or can_pass_over(found, len(shown.frames)):
            times = [found.times[first + index] for index in shown.frames]
            frames = _decode_at(path, times, found.keys, max_pixels, plain=not found.oddity)
            if frames is not None:
                return _decoded(frames, shown, last - first)
    return _decode_all(path, choose, max_pixels, found, stretch)


def can_pass_over(found: Survey, count: int) -> bool:
    """Returns whether many frames need not be decoded, since no other frame refers to them.

    Args:
        found: The packets of a video.
        count: Number of frames that are taken.
    """
    return not found.oddity and len(found.times) - count > _WORTH_A_SEEK


@dataclass(frozen=True)
class Contents:
    """Measurements of a video, made by decoding all of its frames."""

    frames: int
    partial: bool
    """True if parts could not be decoded."""
    rotation: int
    """Degrees by which the frames are turned to stand upright."""


def decode_completely(path: Path) -> Contents:
    """Decodes every frame of a video.

    Raises:
        DecodeError: If there is no video.
    """
    scan = _scan(path, frozenset(), None)
    return Contents(len(scan.times), scan.partial, scan.rotation)


@dataclass(frozen=True)
class _Frame:
    pixels: Pixels
    size: tuple[int, int]
    """Width and height before it was resized, upright."""


def _decoded(frames: Sequence[_Frame], shown: ShownFrames, total: int, partial: bool = False) -> DecodedFrames:
    pixels = np.stack([frame.pixels for frame in frames])
    return DecodedFrames(pixels, shown.fps, shown.total, shown.moments, total, "pyav", partial, size=frames[0].size)


def _frames_saved(found: Survey, indices: Sequence[int]) -> int:
    """Returns how many frames need not be decoded if the reader seeks."""
    decoded, place = 0, 0
    for index in sorted(set(indices)):
        key = bisect_left(found.times, _key_before(found.keys, found.times[index]) - TIME_SLACK)
        start = max(place, key)
        decoded += index + 1 - start
        place = index + 1
    return len(found.times) - decoded


def _decode_at(
    path: Path, times: Sequence[float], keys: Sequence[float], max_pixels: int | None, plain: bool
) -> list[_Frame] | None:
    """Decodes the frames with the given times in seconds, ascending; returns None if one of them is not found.

    In a ``plain`` H.264 video, other frames to which none refers are passed over.
    """
    kept: dict[float, _Frame] = {}
    taken = set(times)
    wanted = sorted(taken)
    shrink = _Shrink(max_pixels)
    place = -math.inf
    with open_video(path) as container:
        stream = video_stream(container, path)
        stream.thread_type, stream.thread_count = "NONE", 1
        try:
            while wanted:
                if (key := _key_before(keys, wanted[0])) > place:
                    seek_before(container, stream, key)
                    place = key
                for packet in container.demux(stream):
                    if plain:
                        needed = packet.pts is None or seconds(packet.pts, packet.time_base) in taken
                        stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
                    for frame in stream.decode(packet):
                        time = seconds(frame.pts, frame.time_base)
                        place = max(place, time)
                        if wanted and abs(time - wanted[0]) < TIME_SLACK:
                            kept[wanted.pop(0)] = shrink(frame)
                        elif wanted and not time < wanted[0]:
                            return None
                    if not wanted or _key_before(keys, wanted[0]) > place + TIME_SLACK:
                        break
                else:
                    return None
        except PYAV_ERRORS:
            return None
    return [kept[time] for time in times]


def _key_before(keys: Sequence[float], time: float) -> float:
    """Returns the time of the last key frame at or before a time; minus infinity if there is none."""
    place = bisect_right(keys, time + TIME_SLACK)
    return keys[place - 1] if place else -math.inf


def _decode_all(
    path: Path, choose: FrameChooser, max_pixels: int | None, found: Survey, stretch: Stretch | None
) -> DecodedFrames:
    """Decodes a video from the first packet on and keeps the chosen frames only."""
    if found.times and stretch is None:
        times: Sequence[float] = found.times
    elif stretch is None:
        times = [float("nan")] * found.packets
    else:
        times = _scan(path, frozenset(), max_pixels).times
    for _ in range(2):  # a damaged file has fewer frames than packets
        if not times:
            break
        first, last = within(times, times[0], stretch, path)
        shown = choose_by_time(choose, times[first:last], found.fps)
        indices = [first + index for index in shown.frames]
        scan = _scan(path, frozenset(indices), max_pixels)
        if all(index in scan.frames for index in indices) and len(scan.times) == len(times):
            return _decoded([scan.frames[index] for index in indices], shown, last - first, scan.partial)
        times = scan.times
    raise DecodeError(f"{path}: PyAV: {len(times)} frames can be decoded (the file is damaged or encrypted)")


@dataclass(frozen=True)
class _Scan:
    """Result of one pass over a file."""

    times: list[float]
    """Time of each decoded frame in seconds; NaN if the file has none."""
    frames: dict[int, _Frame]
    partial: bool
    rotation: int
    """Degrees by which the first frame is turned to stand upright."""


def _scan(path: Path, wanted: frozenset[int], max_pixels: int | None) -> _Scan:
    """Decodes all packets and converts the wanted frames."""
    frames: dict[int, _Frame] = {}
    times: list[float] = []
    partial, rotation = False, 0
    shrink = _Shrink(max_pixels)
    with open_video(path) as container:
        stream = video_stream(container, path)
        stream.thread_type, stream.thread_count = "NONE", 1
        for packet in packets_of(container, stream):
            try:
                decoded = stream.decode(packet)
            except PYAV_ERRORS:
                partial = True
                continue
            partial = partial or packet is None
            for frame in decoded:
                if len(times) in wanted:
                    frames[len(times)] = shrink(frame)
                rotation = rotation if times else round(frame.rotation)
                times.append(seconds(frame.pts, frame.time_base))
    return _Scan(times, frames, partial, rotation)


class _Shrink:
    """Converts frames to RGB, upright and of one size: that of the first frame, within the largest number of pixels."""

    def __init__(self, max_pixels: int | None) -> None:
        self.max_pixels = max_pixels
        self.size: tuple[int, int] | None = None
        self._convert = VideoReformatter()  # that of each frame would set up its conversion anew

    def __call__(self, frame: VideoFrame) -> _Frame:
        check_frame_size(frame.width, frame.height)
        turns = round(frame.rotation / 90) % 4
        upright = np.rot90(self._convert.reformat(frame, format="rgb24").to_ndarray(), k=turns)  # by the display matrix
        pixels: Pixels = upright.astype(np.uint8, copy=False)
        self.size = self.size or fit_size(pixels.shape[0], pixels.shape[1], self.max_pixels)
        return _Frame(resize(pixels, self.size), (pixels.shape[1], pixels.shape[0]))
