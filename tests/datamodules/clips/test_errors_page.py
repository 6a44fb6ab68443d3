"""The messages about clips in docs/errors.md are those that are produced."""

import os
import sys
import zipfile

import pytest
from errors_page import documented, rows_that_say
from two_classes import make  # noqa: F401

from vidreason.datamodules.clips import decoded, helper_process, time_limit
from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.reading import read_frames
from vidreason.datamodules.clips.sampling import Stretch
from vidreason.prepare.caching import fill_cache

TITLE = "Reading clips"


def message(path, **options):
    """The reason why a clip cannot be read in this process."""
    stretch = options.pop("stretch", None)
    with pytest.raises(DecodeError) as error:
        read_frames(path, FrameOptions(**{"timeout": None} | options), stretch=stretch)
    return str(error.value)


def unreadable(folder, write_clip, monkeypatch):
    """Yields one message of each kind about one clip."""
    good = write_clip(folder / "good.mp4", 10)
    yield message(folder / "none.mp4")
    (folder / "notes").mkdir()
    yield message(folder / "notes")
    os.mkfifo(folder / "pipe.mp4")
    yield message(folder / "pipe.mp4")
    for name, content in (("empty", b""), ("lfs", b"version https://git-lfs.github.com/spec/v1"), ("text", b"text")):
        (folder / f"{name}.mp4").write_bytes(content)
        yield message(folder / f"{name}.mp4")
    (folder / "cut.zip").write_bytes(b"PK")
    yield message(folder / "cut.zip")
    with zipfile.ZipFile(folder / "bad.zip", "w") as archive:
        archive.writestr("1.png", b"no picture")
    yield message(folder / "bad.zip")
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.bmp", bytes(10**6))
    yield message(folder / "bomb.zip")
    yield message(good, stretch=Stretch(50.0))
    yield message(good, reader="decord", stretch=Stretch(0.1))
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    yield message(good, reader="torchcodec")
    monkeypatch.setattr(decoded, "MAX_FRAME_PIXELS", 1000)
    yield message(good).replace("0 megapixels", "64 megapixels")


def of_the_helper(path, monkeypatch):
    """Yields what is said of a clip if the helper process fails."""
    failures = (
        helper_process.TimeLimitError("still not read after 30 seconds"),
        helper_process.HelperError("the decoder crashed (SIGSEGV)"),
        MemoryError(),
    )
    for failure in failures:

        def call(*args, failure=failure, **kwargs):
            raise failure

        monkeypatch.setattr(time_limit.helper_process, "call", call)
        yield message(path, timeout=30.0)
    monkeypatch.undo()


ELSEWHERE = (
    *("no video stream", "can be decoded (", "seconds, twice", "repair the disk", "the headers of"),
    *("nothing about it is cached", "damaged, the clip", "no more frames", "frames.cache is null"),
)
"""Parts of rows whose messages other tests produce."""


def test_each_message_about_a_clip_has_its_row(tmp_path, write_clip, monkeypatch):
    pytest.importorskip("decord", reason="decord has no wheel for this platform")
    said = [*of_the_helper(write_clip(tmp_path / "x.mp4", 3), monkeypatch)]
    said += unreadable(tmp_path, write_clip, monkeypatch)
    assert [text for text in said if not rows_that_say(text, TITLE)] == []
    found = {max(rows_that_say(text, TITLE), key=len) for text in said}
    unseen = set(documented(TITLE)) - found
    assert {row for row in unseen if not any(part in row for part in ELSEWHERE)} == set()


def test_each_message_of_the_cache_has_its_row(tmp_path, write_clip, make):  # noqa: F811
    path, options = write_clip(tmp_path / "a.mp4", 10), FrameOptions(timeout=None, cache=str(tmp_path / "cache"))
    read_frames(path, options)
    (entry,) = (tmp_path / "cache").glob("*.frames")
    entry.write_bytes(b"")
    (tmp_path / "file").write_text("no folder")
    said = []
    for more, match in (
        ({}, "damaged"),
        ({"cache_gb": 1e-9, "num_frames": 3}, "raise frames.cache_gb"),
        ({"cache": str(tmp_path / "file" / "x")}, "free some space"),
    ):
        with pytest.warns(UserWarning, match=match) as warned:
            read_frames(path, FrameOptions(**vars(options) | more))
        said += [str(warning.message) for warning in warned]
    with pytest.raises(ValueError, match="frames.cache") as error:
        fill_cache(make(), 1)
    said.append(str(error.value))
    assert len({max(rows_that_say(text, TITLE), key=len) for text in said}) == len(said) == 4
