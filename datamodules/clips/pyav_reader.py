"""Reads videos with PyAV from the first to the last packet, skipping damaged ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from vidreason.datamodules.clips.decoded import DecodedVideo, DecodeError, first_line, fit_size, resize
from vidreason.datamodules.clips.sampling import FrameChooser, choose_by_time
from vidreason.datamodules.types import FrameTiming

_PYAV_ERRORS = (av.FFmpegError, OSError)


def read_with_pyav(path: Path, choose: FrameChooser, max_pixels: int | None) -> DecodedVideo:
    """Decodes all packets in order, so that a damaged index does no harm, and keeps only the chosen frames."""
    times, fps = _survey(path)
    shown = choose_by_time(choose, times, fps)
    scan = _scan(path, frozenset(shown.frames), max_pixels)
    if len(scan.times) not in (len(times), 0):  # a damaged file has fewer frames than packets: choose among the frames
        shown = choose_by_time(choose, scan.times, fps)
        scan = _scan(path, frozenset(shown.frames), max_pixels)
    missing = [index for index in shown.frames if index not in scan.frames]
    if missing:
        raise DecodeError(f"{path}: PyAV: {len(scan.times)} frames can be decoded (the file is damaged or encrypted)")
    frames = torch.stack([scan.frames[index] for index in shown.frames])
    timing = FrameTiming(shown.fps, shown.total, shown.moments)
    return DecodedVideo(frames, timing, len(scan.times), "pyav", scan.partial)


@dataclass(frozen=True)
class _Scan:
    """Result of one pass over a file."""

    times: list[float]
    """Time of each decoded frame in seconds; NaN if the file has none"""
    frames: dict[int, Tensor]
    partial: bool


def _survey(path: Path) -> tuple[list[float], float]:
    """Returns the time of each frame in seconds and the frame rate, without decoding.

    Packets are counted, since a header's frame count may be 0 or wrong.
    """
    times: list[float] = []
    with _open(path) as container:
        stream = _video_stream(container, path)
        rate = stream.average_rate or stream.guessed_rate
        for packet in _packets(container, stream):
            if packet is not None and packet.size > 0:
                times.append(_seconds(packet.pts, packet.time_base))
    if not times:
        raise DecodeError(f"{path}: PyAV: the video stream is empty")
    return sorted(times), float(rate) if rate else 1.0


def _seconds(pts: int | None, time_base: Fraction | None) -> float:
    return float(pts * time_base) if pts is not None and time_base is not None else math.nan


def _scan(path: Path, wanted: frozenset[int], max_pixels: int | None) -> _Scan:
    """Decodes all packets and converts the wanted frames."""
    frames: dict[int, Tensor] = {}
    size: tuple[int, int] | None = None
    times: list[float] = []
    partial = False
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
                if len(times) in wanted:
                    pixels = _upright(frame)
                    size = size or fit_size(pixels.shape[1], pixels.shape[2], max_pixels)
                    frames[len(times)] = resize(pixels, size)
                times.append(_seconds(frame.pts, frame.time_base))
    return _Scan(times, frames, partial)


def _open(path: Path) -> InputContainer:
    try:
        return av.open(str(path), metadata_errors="ignore")
    except _PYAV_ERRORS as error:
        raise DecodeError(f"{path}: PyAV: {first_line(error)}") from error


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    """Returns the stream that FFmpeg considers best; cover art is not a video."""
    moving = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not moving:
        raise DecodeError(f"{path}: PyAV: the file has no video stream")
    best = container.streams.best("video")
    return next((stream for stream in moving if best is not None and stream.index == best.index), moving[0])


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream] | None]:
    """Yields the packets of a stream and then the flushing packet; None marks the end of a truncated file."""
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
    """Returns the frame as [3, H, W] uint8, rotated by the display matrix."""
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90) % 4)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).contiguous()
