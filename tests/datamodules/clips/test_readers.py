"""Files that decord reads wrongly without an error, and seeking: the frames are those of a plain loop over PyAV."""

from fractions import Fraction

import av
import numpy as np
import pytest

from vidreason.datamodules.clips.decoding import FrameOptions, decode

SIZE = (96, 64)


def write(path, n=40, size=SIZE, codec="libx264", **options):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={key.replace("_", "-"): v for key, v in options.items()})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(n):
            frame = np.roll(base, 3 * i, axis=1)
            frame[:20, :20] = i * 4 % 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def copy(source, target, shift=0.0):
    """Copies packets, ``shift`` seconds earlier; times that restart are continued, as players do."""
    last = offset = 0
    with av.open(str(source)) as given, av.open(str(target), "w") as container:
        stream = given.streams.video[0]
        out = container.add_stream_from_template(stream)
        for packet in given.demux(stream):
            if not packet.size:
                continue
            if packet.dts + offset < last:
                offset = last + int(Fraction(1, 25) / packet.time_base) - packet.dts
            last = packet.dts + offset
            move = offset - int(shift / packet.time_base)
            packet.dts, packet.pts, packet.stream = packet.dts + move, packet.pts + move, out
            container.mux(packet)
    return target


def interlaced(folder):
    return write(folder / "clip.ts", codec="mpeg2video", flags="+ildct+ilme", g="12", bf="2")


def transport_stream(folder):
    return write(folder / "clip.ts", g="12", bf="3")


def edit_list(folder):
    """The muxer writes an edit list for times before 0."""
    return copy(write(folder / "whole.mp4", 90, g="30"), folder / "clip.mp4", shift=1.3)


def size_change(folder):
    parts = [write(folder / f"{w}.ts", 20, (w, h), g="10").read_bytes() for w, h in (SIZE, (128, 96))]
    (folder / "both.ts").write_bytes(b"".join(parts))
    return copy(folder / "both.ts", folder / "clip.mp4")


def intra_refresh(folder):
    return write(folder / "clip.mp4", 120, x264_params="intra-refresh=1:keyint=25")


def open_gop(folder):
    return write(folder / "clip.mp4", 200, g="12", bf="3", x264_params="open-gop=1")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (interlaced, "container mpegts"),
        (transport_stream, "container mpegts"),
        (edit_list, "an edit list"),
        (size_change, "a change of format"),
        (intra_refresh, "key frames from which decoding cannot start"),
        (open_gop, "key frames from which decoding cannot start"),
    ],
)
def test_what_decord_reads_wrongly_goes_to_pyav(tmp_path, make, why):
    pytest.importorskip("decord", reason="decord has no wheel for this platform")
    path = make(tmp_path)
    with av.open(str(path)) as container:
        plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    read = decode(path, FrameOptions(num_frames=6))
    assert read.reader == "pyav"
    assert why in read.why
    assert read.frames_in_file == len(plain)
    for shown, index in zip(read.pixels, read.indices, strict=True):
        if plain[index].shape == shown.shape:  # frames of another size were resized
            assert np.array_equal(shown, plain[index]), index
