"""Opens videos with PyAV and reads their packets without decoding them: times, key frames, and what is unusual."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from vidreason.datamodules.clips.decoded import DecodeError, check_frame_size, first_line
from vidreason.datamodules.clips.sampling import Stretch

PYAV_ERRORS = (av.FFmpegError, OSError)
TIME_SLACK = 1e-3
"""Seconds by which the times in a container may be rounded."""
_SEEK_BACK = (0.0, 2.0, 10.0, 60.0)  # seconds before the stretch; some containers seek behind the target
_FIRST_PACKETS = 32  # among which the first frame is, although packets are in the order of decoding
_IDR, _SPS = 5, 7  # types of NAL units in H.264 (ITU-T H.264, table 7-1)
_SIMPLE_CONTAINERS = ("mov,mp4", "matroska")


@dataclass(frozen=True)
class Survey:
    """The packets of a video, or of a stretch of it."""

    times: tuple[float, ...]
    """Time in seconds of each frame that is shown, ascending; empty if the file does not give all of them."""
    keys: tuple[float, ...]
    """Times of the key frames, ascending."""
    packets: int
    """Number of packets, which is the number of frames unless the file is damaged or interlaced."""
    origin: float
    """Time of the first frame of the file in seconds."""
    fps: float
    """Frames per second in the header."""
    oddity: str
    """The reason why decord may return other frames than PyAV; empty if it does not."""


def survey(path: Path, stretch: Stretch | None = None) -> Survey:
    """Reads the packets of a video, or only those of a stretch and of the key frame before it.

    A header's frame count is not used, since it may be 0 or wrong.

    Raises:
        DecodeError: If there is no video, or its frames are too large.
    """
    with open_video(path) as container:
        stream = video_stream(container, path)
        oddity = _oddity(container, stream)
        rate = stream.average_rate or stream.guessed_rate
        origin = 0.0
        if stretch is not None:
            origin = _first_time(container, stream)
            seek_before(container, stream, origin + stretch.start)
        found = _Packets(stream.codec_context.extradata or b"" if stream.codec_context.name == "h264" else None)
        last = None if stretch is None else origin + stretch.end
        for packet in packets_of(container, stream):
            if packet is None or packet.size == 0:
                continue
            found.add(packet)
            if last is not None and packet.dts is not None and seconds(packet.dts, packet.time_base) > last:
                break
    if not found.packets:
        raise DecodeError(f"{path}: PyAV: the video stream is empty")
    times = sorted(found.times) if found.untimed == 0 else []
    return Survey(
        tuple(times),
        tuple(sorted(found.keys)),
        found.packets,
        times[0] if times and stretch is None else origin,
        float(rate) if rate else 1.0,
        oddity or found.oddity,
    )


class _Packets:
    """Collects packets; for H.264, ``extradata`` is the avcC record of the container."""

    def __init__(self, extradata: bytes | None) -> None:
        self.extradata = extradata
        self.parameters: set[bytes] = set()
        if extradata is not None and extradata[:1] == b"\1" and len(extradata) > 8:
            self.parameters.add(extradata[8 : 8 + int.from_bytes(extradata[6:8], "big")])  # the first SPS of avcC
        self.times: list[float] = []
        self.keys: list[float] = []
        self.packets = 0
        self.untimed = 0
        self.oddity = ""

    def add(self, packet: Packet[VideoStream]) -> None:
        if packet.is_discard:
            self.oddity = "an edit list"
            return
        self.packets += 1
        if packet.pts is None or packet.time_base is None:
            self.untimed += 1
            return
        time = seconds(packet.pts, packet.time_base)
        self.times.append(time)
        if packet.is_keyframe:
            self.keys.append(time)
            if self.extradata is not None:
                self._look_into(bytes(packet))
        if self.packets > 1 and packet.has_sidedata("new_extradata"):
            self.oddity = "a change of format in mid-file"

    def _look_into(self, packet: bytes) -> None:
        """Looks for what decord does not expect in a key frame: a new format, or no complete picture."""
        assert self.extradata is not None
        units = dict(nal_units(packet, self.extradata))
        if _SPS in units:
            self.parameters.add(units[_SPS])
        if len(self.parameters) > 1:
            self.oddity = "a change of format in mid-file"
        elif _IDR not in units:
            self.oddity = "key frames from which decoding cannot start"


def nal_units(packet: bytes, extradata: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields type and bytes of the NAL units of an H.264 packet; nothing if they have no lengths (ISO/IEC 14496-15).

    Args:
        packet: The packet.
        extradata: The avcC record, whose fifth byte tells how many bytes a length has.
    """
    if len(extradata) < 5 or extradata[0] != 1:
        return
    size = (extradata[4] & 3) + 1
    place = 0
    while place + size < len(packet):
        start = place + size
        place = start + int.from_bytes(packet[place:start], "big")
        yield packet[start] & 31, packet[start:place]


def _oddity(container: InputContainer, stream: VideoStream) -> str:
    """Returns what the header says against decord, which was compared with PyAV on files of each kind."""
    codec = stream.codec_context
    if not container.format.name.startswith(_SIMPLE_CONTAINERS):
        return f"container {container.format.name.partition(',')[0]}"
    if codec.name != "h264":
        return f"codec {codec.name}"
    if codec.format is not None and any(part.bits > 8 for part in codec.format.components):
        return "more than 8 bits per colour"
    order = str(getattr(codec.field_order, "name", codec.field_order)).lower()
    if order not in ("unknown", "progressive", "0", "1"):
        return "interlaced"
    return ""


def open_video(path: Path) -> InputContainer:
    """Opens a video.

    Raises:
        DecodeError: If FFmpeg cannot read it.
    """
    try:
        return av.open(str(path), metadata_errors="ignore")
    except PYAV_ERRORS as error:
        raise DecodeError(f"{path}: PyAV: {first_line(error)}") from error


def video_stream(container: InputContainer, path: Path) -> VideoStream:
    """Returns the stream that FFmpeg considers best; cover art is not a video.

    Raises:
        DecodeError: If there is none, or its frames are too large.
    """
    moving = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not moving:
        raise DecodeError(f"{path}: PyAV: the file has no video stream")
    best = container.streams.best("video")
    stream = next((stream for stream in moving if best is not None and stream.index == best.index), moving[0])
    try:
        check_frame_size(stream.codec_context.width, stream.codec_context.height)
    except DecodeError as error:
        raise DecodeError(f"{path}: {error}") from error
    return stream


def packets_of(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream] | None]:
    """Yields the packets of a stream and then the flushing packet; None marks the end of a truncated file."""
    demux = container.demux(stream)
    while True:
        try:
            packet = next(demux)
        except StopIteration:
            return
        except PYAV_ERRORS:
            yield None
            return
        yield packet


def seek_before(container: InputContainer, stream: VideoStream, time: float) -> None:
    """Moves to a key frame at or before a time in seconds; to the start of the file if the container cannot do it."""
    assert stream.time_base is not None
    for back in _SEEK_BACK:
        try:
            container.seek(int((time - back) / stream.time_base), stream=stream)
            packet = next(packets_of(container, stream), None)
            landed = packet is not None and packet.pts is not None
            if landed and seconds(packet.pts, packet.time_base) <= time + TIME_SLACK:  # type: ignore[union-attr]
                container.seek(int((time - back) / stream.time_base), stream=stream)  # back to that packet
                return
        except PYAV_ERRORS:
            continue
    rewind(container)


def rewind(container: InputContainer) -> None:
    """Moves to the start of the file."""
    container.seek(container.start_time or 0)


def seconds(pts: int | None, time_base: Fraction | None) -> float:
    """Returns a time stamp in seconds; NaN if there is none."""
    if pts is None or time_base is None:
        return float("nan")
    return pts * time_base.numerator / time_base.denominator  # as exact as the product with a Fraction, and faster


def within(times: Sequence[float], origin: float, stretch: Stretch | None, path: Path) -> tuple[int, int]:
    """Returns the range of frames whose times are in a stretch; if none is, the frame that is shown at its start.

    Args:
        times: Times of the frames in seconds, ascending.
        origin: Time of the first frame of the file.
        stretch: The stretch; None is the whole file.
        path: The file, for messages.

    Raises:
        DecodeError: If the stretch begins after the last frame.
    """
    if stretch is None:
        return 0, len(times)
    first = bisect_left(times, origin + stretch.start - TIME_SLACK)
    last = bisect_left(times, origin + stretch.end - TIME_SLACK)
    if first < last:
        return first, last
    if first == len(times) or first == 0:
        ends = times[-1] - origin if times else 0.0
        raise DecodeError(f"{path}: the stretch begins at {stretch.start:g} s, after the last frame at {ends:.2f} s")
    return first - 1, first


def _first_time(container: InputContainer, stream: VideoStream) -> float:
    """Returns the time of the first frame in seconds."""
    first = []
    for packet in packets_of(container, stream):
        if packet is not None and packet.pts is not None and not packet.is_discard:
            first.append(seconds(packet.pts, packet.time_base))
        if packet is None or len(first) == _FIRST_PACKETS:
            break
    return min(first, default=0.0)
