import csv
import hashlib
import os

from vidreason.datamodules.clips.measuring import ClipProbe, measure_clip
from vidreason.datamodules.clips.time_limit import call_reader
from vidreason.datamodules.file_hash import content_sha
from vidreason.datamodules.sources.probing import Unreadable, map_clips, probe_clips


def test_a_clip_is_measured(tmp_path, write_clip):
    path = write_clip(tmp_path / "a.mp4", 24, size=(96, 64), fps=12)
    probe = measure_clip(path)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert (probe.sha, probe.frames, probe.fps, probe.width, probe.height) == (sha, 24, 12.0, 96, 64)
    assert not probe.partial
    assert probe.seconds == 2.0
    assert content_sha(path) == sha


def test_a_varying_rate_is_measured_by_the_times_of_the_frames(tmp_path, write_clip):
    times = [0.0, 0.04, 0.08, 0.4, 0.8, 0.84, 1.6]
    probe = measure_clip(write_clip(tmp_path / "a.mkv", len(times), times=times))
    assert probe.frames == len(times)
    assert 1.6 <= probe.seconds <= 1.6 + 0.8
    assert 3 < probe.fps < 5


def probed(paths, timeout=60.0):
    return dict(zip(paths, probe_clips([(path, None) for path in paths], 2, timeout), strict=True))


def test_reasons_are_short(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "lfs.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    (tmp_path / "text.mp4").write_text("no video at all")
    os.mkfifo(tmp_path / "pipe.mp4")
    reasons = {
        "empty": "the file is empty",
        "lfs": "a Git LFS pointer and not the clip: run `git lfs pull` in its repository",
        "text": "PyAV: InvalidDataError: Invalid data found when processing input",
        "pipe": "not an ordinary file",
        "gone": "no such file",
    }
    found = probed([tmp_path / f"{name}.mp4" for name in reasons])
    assert {path.stem: result.reason for path, result in found.items()} == reasons


BAD = """
import os, re, time
from vidreason.datamodules.clips.measuring import measure_clip


def probe(path, stretch):
    if path.stem == "hangs":
        re.match(r"(a|aa)+$", "a" * 100 + "b")  # in C, without releasing the interpreter, for longer than anyone waits
    if path.stem == "crashes":
        os.abort()
    if path.stem == "hungry":
        raise MemoryError
    return measure_clip(path, stretch)
"""


def test_no_clip_stops_the_others(tmp_path, write_clip, monkeypatch):
    """One spins in C, one takes its process along, one wants too much memory."""
    (tmp_path / "bad_readers.py").write_text(BAD)
    monkeypatch.syspath_prepend(tmp_path)
    import bad_readers

    names = ("first", "hangs", "crashes", "hungry", "last")
    paths = [write_clip(tmp_path / f"{name}.mp4", 3) for name in names]

    def read(path, stretch):
        return call_reader(bad_readers.probe, path, stretch, timeout=3.0)

    found = dict(zip(names, map_clips(read, [(path, None) for path in paths], 2), strict=True))
    assert isinstance(found["first"], ClipProbe)
    assert isinstance(found["last"], ClipProbe)
    assert found["hangs"] == Unreadable("still not read after 3 seconds")
    assert found["crashes"] == Unreadable("the decoder crashed (SIGABRT)")
    assert found["hungry"] == Unreadable("not enough memory")


def test_odd_files_are_told_from_sound_ones(test_data):
    with (test_data / "odd_videos" / "manifest.csv").open(newline="", encoding="utf-8") as file:
        expected = {test_data / "odd_videos" / row["path"]: row["expect"] for row in csv.DictReader(file)}
    wrong = {
        path.name: result
        for path, result in probed(list(expected)).items()
        if isinstance(result, Unreadable) != (expected[path] in ("reject", "no_video"))
    }
    assert wrong == {}
    assert {path.suffix for path in expected} > {".mp4", ".zip"}
