import io
import zipfile

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.header import header_of
from vidreason.datamodules.clips.reading import read_frames


def picture(value: int, size: tuple[int, int] = (16, 12), kind: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value,) * 3).save(buffer, kind)
    return buffer.getvalue()


def archive(path, entries):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


def values(video):
    return [int(v) for v in video.frames[:, 0, 6, 8]]


def test_names_are_sorted_as_numbers_and_junk_is_passed_over(tmp_path):
    names = [f"clip/f_{i}.png" for i in (10, 2, 1, 9)]
    entries = [(name, picture(int(name[7:-4]))) for name in names]
    junk = [("__MACOSX/clip/f_1.png", b"x"), ("clip/.f_3.png", b"x"), ("clip/Thumbs.db", b"x"), ("clip/", b"")]
    video = read_frames(archive(tmp_path / "clip.zip", entries + junk), FrameOptions(num_frames=4))
    assert values(video) == [1, 2, 9, 10]
    assert (video.reader, video.timing.total_frames, video.partial) == ("pictures", 4, False)


def test_sizes_and_modes_may_differ_and_nothing_is_unpacked(tmp_path):
    entries = [("../a.png", picture(10)), ("b.jpg", picture(200, (32, 24), "JPEG", "L"))]
    inside = tmp_path / "inside"
    inside.mkdir()
    video = read_frames(archive(inside / "clip.zip", entries), FrameOptions(num_frames=2))
    assert video.frames.shape == (2, 3, 12, 16)
    assert np.abs(np.array(values(video)) - [10, 200]).max() <= 2
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["clip.zip"]


def test_a_bad_picture_is_passed_over(tmp_path):
    entries = [(f"{i}.png", picture(i)) for i in range(5)]
    entries[1] = ("1.png", picture(1)[:40])
    video = read_frames(archive(tmp_path / "clip.zip", entries), FrameOptions(num_frames=4))
    assert values(video) == [0, 2, 3, 4]
    assert video.partial


@pytest.mark.parametrize("kind", ["EPS", "PCX", "SGI"])
def test_rare_formats_are_not_opened_whatever_their_name(tmp_path, monkeypatch, kind):
    """Pillow would show EPS by starting Ghostscript."""
    started = []
    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *given: started.append(given) or Image.new("RGB", (9, 9)).im
    )
    content, options = picture(7, kind=kind), FrameOptions(timeout=None)
    path = archive(tmp_path / "clip.zip", [("0.png", content)])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "0.jpg").write_bytes(content)
    for clip in (path, folder):
        with pytest.raises(DecodeError, match="no readable picture among 1; store the pictures as JPEG or PNG"):
            read_frames(clip, options)
        assert header_of(clip) is None
    mixed = archive(tmp_path / "mixed.zip", [("0.png", content), ("1.png", picture(50))])
    assert values(read_frames(mixed, FrameOptions(num_frames=1, timeout=None))) == [50]
    assert started == []


@pytest.mark.parametrize("content", [b"PK\x05\x06" + bytes(18), b"no zip"])
def test_empty_and_broken_archives(tmp_path, content):
    path = tmp_path / "clip.zip"
    path.write_bytes(content)
    with pytest.raises(DecodeError, match=r"clip\.zip"):
        read_frames(path, FrameOptions())
