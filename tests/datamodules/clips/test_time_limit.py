"""Many files are looked at within a time limit: one that is stuck is named, one that crashes costs itself."""

import os
import sys

import pytest

from vidreason.datamodules import manifest
from vidreason.datamodules.clips import header, helper_process
from vidreason.datamodules.clips.header import ClipHeader, read_headers
from vidreason.datamodules.clips.time_limit import ReadTimeoutError, call_for_files, existing
from vidreason.datamodules.manifest import ManifestDataModule
from vidreason.datamodules.types import Clip
from vidreason.pipelines import content

LOOKING = """
import os, time
def look(path):
    if path.name == "stuck":
        time.sleep(600)
    if path.name == "crash":
        os.abort()
    if path.name == "secret":
        raise PermissionError(13, "Permission denied", str(path))
    return path.name
"""


@pytest.fixture
def look(tmp_path, monkeypatch):
    (tmp_path / "looking.py").write_text(LOOKING)
    monkeypatch.syspath_prepend(tmp_path)
    helper_process.close()
    yield __import__("looking").look
    helper_process.close()
    del sys.modules["looking"]


def test_a_stuck_file_is_named_and_a_crash_costs_one_file(look, tmp_path):
    names = ["a", "crash", "b", "secret", "c", "d"]
    paths = [tmp_path / name for name in names]
    wanted = [None if name in ("crash", "secret") else name for name in names]
    assert list(call_for_files(look, paths, 20.0, at_once=3)) == wanted
    found = call_for_files(look, [tmp_path / "a", tmp_path / "b", tmp_path / "stuck", tmp_path / "c"], 2.0, at_once=3)
    with pytest.raises(ReadTimeoutError, match=r"/stuck: still not read after 2 seconds"):
        list(found)


def test_headers_of_what_is_no_clip_are_unknown(tmp_path, write_clip):
    os.mkfifo(tmp_path / "pipe.mp4")
    write_clip(tmp_path / "a.mp4", 20, size=(48, 32))
    (tmp_path / "b.mp4").write_text("no video")
    clips = [Clip(tmp_path / name, "a", name) for name in ("pipe.mp4", "a.mp4", "none.mp4", "b.mp4", "a.mp4")]
    told = {"clip_frames": "7", "clip_fps": "5", "clip_width": "4", "clip_height": "2"}
    clips.append(Clip(tmp_path / "pipe2.mp4", "a", "told", fields=told))
    of_a = ClipHeader(20, 10.0, 48, 32)
    assert read_headers(clips, 30.0) == [None, of_a, None, None, of_a, ClipHeader(7, 5.0, 4, 2)]


def stuck(*args, **kwargs):
    raise ReadTimeoutError("/mnt/a.mp4: still not read after 30 seconds")
    yield


def test_what_depends_on_a_stuck_file_says_so(tmp_path, write_clip, monkeypatch, caplog):
    write_clip(tmp_path / "a.mp4", 3)
    (tmp_path / "m.csv").write_text("path,label\na.mp4,x\nb.mp4,y\n")
    monkeypatch.setattr(manifest, "existing", lambda paths, timeout: list(stuck()))
    reason = r"m.csv: /mnt/a.mp4: still not read after 30 seconds: repair the disk or network mount, or set root"
    with pytest.raises(ValueError, match=reason):
        ManifestDataModule(tmp_path / "m.csv").setup("fit")
    monkeypatch.setattr(header, "call_for_files", stuck)
    assert read_headers([Clip(tmp_path / "a.mp4", "x", "a")], 30.0) == [None]
    assert "the headers of 1 files are not looked at" in caplog.text
    monkeypatch.setattr(content, "call_for_files", stuck)
    assert content.listing_print([tmp_path]) == "unproven: /mnt/a.mp4: still not read after 30 seconds"


def test_fingerprints_pass_over_pipes(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "a.mp4").write_text("a")
    before = content.listing_print([tmp_path])
    assert len(before) == 16
    (tmp_path / "a.mp4").write_text("b")
    assert content.listing_print([tmp_path]) != before
    assert existing([tmp_path / "pipe.mp4", tmp_path / "none"], 30.0) == {tmp_path / "pipe.mp4"}
