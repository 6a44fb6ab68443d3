import csv
import hashlib
import os
import time
from pathlib import Path

import pytest

from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.datamodules.file_hash import content_sha
from vidreason.datamodules.sources.probing import ClipProbe, Unreadable, probe_clip, probe_clips

BAD = """
import os, signal, time
from vidreason.datamodules.file_hash import content_sha
from vidreason.datamodules.sources.probing import probe_clip


def probe(path):
    if path.stem == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)
    if path.stem == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if path.stem == "hungry":
        raise MemoryError
    return probe_clip(path)
"""


def test_a_clip_is_measured(tmp_path, write_clip):
    path = write_clip(tmp_path / "a.mp4", 24, size=(96, 64), fps=12)
    probe = probe_clip(path)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert probe == ClipProbe(sha, 24, 12.0, 96, 64, partial=False)
    assert probe.seconds == 2.0
    assert content_sha(path) == sha


def test_reasons_are_short(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "lfs.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    (tmp_path / "text.mp4").write_text("no video at all")
    os.mkfifo(tmp_path / "pipe.mp4")
    for name, reason in {
        "empty": "the file is empty",
        "lfs": "a Git LFS pointer",
        "text": "PyAV: InvalidDataError: Invalid data found when processing input$",
        "pipe": "not an ordinary file",
        "gone": "no such file",
    }.items():
        with pytest.raises(DecodeError, match=f"^{reason}") as caught:
            probe_clip(tmp_path / f"{name}.mp4")
        assert str(tmp_path) not in str(caught.value)


def test_no_clip_stops_the_others(tmp_path, write_clip, monkeypatch):
    """One hangs and ignores the polite signal, one takes its process along, one wants too much memory."""
    (tmp_path / "bad_readers.py").write_text(BAD)
    monkeypatch.syspath_prepend(tmp_path)
    import bad_readers

    names = ("first", "hangs", "crashes", "hungry", "text", "last")
    for name in names:
        write_clip(tmp_path / f"{name}.mp4", 3)
    (tmp_path / "text.mp4").write_text("no video")
    paths = [tmp_path / f"{name}.mp4" for name in names]
    start = time.monotonic()
    results = dict(zip(names, probe_clips(paths, 1, 5, bad_readers.probe), strict=True))
    assert isinstance(results["first"], ClipProbe)
    assert isinstance(results["last"], ClipProbe)
    assert results["hangs"] == Unreadable("still not read after 5 seconds")
    assert results["crashes"] == Unreadable("the decoder crashed (exit status -11)")
    assert results["hungry"] == Unreadable("MemoryError")
    assert "Invalid data" in results["text"].reason
    assert time.monotonic() - start < 120


def test_odd_files_are_told_from_sound_ones(test_data):
    with (test_data / "odd_videos" / "manifest.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    paths = [test_data / "odd_videos" / row["path"] for row in rows]
    expected = {"ok": "ok", "partial": "ok", "reject": "no", "no_video": "no", "ok_via_pillow": "no"}
    wrong = [
        row["path"]
        for row, result in zip(rows, probe_clips(paths, 1, 120), strict=True)
        if expected[row["expect"]] != ("no" if isinstance(result, Unreadable) else "ok")
    ]
    assert wrong == []
    assert {Path(row["path"]).suffix for row in rows} > {".mp4", ".zip"}
