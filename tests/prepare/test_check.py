"""``vidreason data check``: each clip, and what is wrong with the set."""

import csv
import json
import os

import numpy as np
import pytest

from vidreason.cli.main import main
from vidreason.datamodules.clips.measuring import ClipProbe
from vidreason.datamodules.clips.sampling import Stretch
from vidreason.datamodules.types import Clip
from vidreason.prepare.findings import find_all


def textured(seed, n=16, size=(96, 64)):
    """Noise that is smooth enough to survive compression, with a square that moves."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    base = coarse.repeat(8, axis=0).repeat(8, axis=1)
    for i in range(n):
        frame = base.copy()
        frame[8:40, 4 * i : 4 * i + 32] = 255 - frame[8:40, 4 * i : 4 * i + 32]
        yield frame


@pytest.fixture
def folder(tmp_path, write_clip):
    for seed in range(3):
        write_clip(tmp_path / f"{seed}.mp4", list(textured(seed)))
    write_clip(tmp_path / "copy.mp4", [frame[::2, ::2] for frame in textured(0)])
    write_clip(tmp_path / "black.mp4", [np.zeros((64, 96, 3), np.uint8)] * 8)
    (tmp_path / "text.mp4").write_text("no video")
    os.mkfifo(tmp_path / "pipe.mp4")
    return tmp_path


def check(folder, rows, header=("path", "label", "split")):
    with (folder / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    status = main(["data", "check", str(folder / "m.csv"), "--json", str(folder / "out.json"), "--workers", "2"])
    return status, json.loads((folder / "out.json").read_text())


def test_every_row_is_reported(folder, capsys):
    rows = [("0.mp4", "a", "train"), ("text.mp4", "a", "train"), ("pipe.mp4", "b", "val"), ("gone.mp4", "b", "val")]
    rows += [("0.mp4", "a", "train"), ("copy.mp4", "a", "test"), ("black.mp4", "", ""), ("", "b", "train")]
    status, report = check(folder, rows)
    assert status == 1
    clips = report["clips"]
    assert [clip["status"] for clip in clips] == ["ok", *["reject"] * 3, "ok", "ok", "ok", "reject"]
    assert [clip["place"] for clip in clips] == [f"row {i}" for i in range(2, 10)]
    first = clips[0]
    assert (first["frames"], first["size"], first["rotation"], first["fps"]) == (16, [96, 64], 0, 10.0)
    assert first["duration"] == 1.6
    assert first["reader"] in ("decord", "pyav")
    assert clips[1]["error"] == "PyAV: InvalidDataError: Invalid data found when processing input"
    assert clips[2]["error"] == "not an ordinary file"
    kinds = [(finding["kind"], finding["clips"]) for finding in report["findings"]]
    assert ("near_duplicate", ["0.mp4", "copy.mp4"]) in kinds
    assert ("black", ["black.mp4"]) in kinds
    assert report["counts"] == {"ok": 4, "partial": 0, "reject": 4}
    assert "8 clips, 4 ok, 0 partial, 4 rejected" in capsys.readouterr().out


def test_a_sound_set_has_no_findings(folder, capsys):
    rows = [(f"{seed}.mp4", label, split) for seed, label, split in ((0, "a", "train"), (1, "b", "train"))]
    status, report = check(folder, rows)
    assert (status, report["findings"]) == (0, [])


def test_mistakes_on_the_command_line(tmp_path, capsys):
    assert main(["data", "chekc", "m.csv"]) == 2
    assert "did you mean 'check'" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path / "none.csv")]) == 2
    assert main(["data"]) == 0


def clip(name, label="a", split="train", group="", stretch=None, **fields):
    return Clip(name, label, name, split, group, fields, stretch=stretch)


def probe(sha, frames=100, **changes):
    return ClipProbe(sha, frames, 10.0, 64, 48, False, **changes)


def found(clips, probes=None):
    probes = probes if probes is not None else [probe(str(i)) for i in range(len(clips))]
    return [(finding.kind, finding.message, finding.clips) for finding in find_all(clips, dict(enumerate(probes)))]


def test_overlap_of_splits_by_group_and_content():
    clips = [clip("1", group="p"), clip("2", "b", "test", group="p"), clip("3"), clip("4", "b")]
    probes = [probe("x"), probe("y"), probe("z"), probe("z")]
    kinds = found(clips, probes)
    assert ("group_overlap", "group 'p' is in the splits test and train", ("1", "2")) in kinds
    assert ("content_overlap", "the same content has the labels a, b", ("3", "4")) in kinds
    parts = [clip("5", stretch=Stretch(0, 5)), clip("6", split="test", stretch=Stretch(5, 10))]
    assert not found(parts, [probe("v", 50), probe("v", 50)])
    across = [parts[0], clip("7", split="test", stretch=Stretch(4, 9))]
    assert ("content_overlap", "the same content is in test and train", ("5", "7")) in found(
        across, [probe("v", 50)] * 2
    )


def test_balance():
    clips = [clip(str(i)) for i in range(20)] + [clip("b", "b"), clip("t", split="test")]
    assert [(kind, message) for kind, message, _ in found(clips)] == [
        ("balance", "no clip of split test has the class b"),
        ("balance", "classes of split train are unbalanced: a has 20 clips, b (1)"),
    ]


def test_telling_metadata_is_scored_on_held_out_clips():
    clips = [clip(str(i), "ab"[i % 2], camera="xy"[i % 2], day=str(i), noise=str(i // 2 % 2)) for i in range(12)]
    probes = [probe(str(i), 100 + i % 2) for i in range(12)]
    told = [message.partition(" alone")[0] for kind, message, _ in found(clips, probes) if kind == "metadata"]
    assert told == ["'camera'", "'number of frames'"]


def test_a_stretch_that_the_video_does_not_cover():
    clips = [clip("1", stretch=Stretch(2, 20)), clip("2", stretch=Stretch(2, 12))]
    assert found(clips) == [("stretch", "the video ends 8.0 s before the stretch does", ("1",))]
