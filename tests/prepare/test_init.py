"""``vidreason init`` on folders and tables made here; only what needs real clips reads clips."""

import csv
import errno
import json
import os
import shlex
import shutil
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from vidreason.cli.main import main
from vidreason.config.trainer_cli import build
from vidreason.datamodules.clips.measuring import ClipProbe
from vidreason.datamodules.manifest import ManifestDataModule
from vidreason.datamodules.sources.probing import Unreadable
from vidreason.datamodules.task import Task

TINY = (48, 32)


def colour(seed, frames=4):
    """Frames of one colour, so that every seed gives a file of other content."""
    value = np.random.default_rng(seed).integers(0, 255, 3, dtype=np.uint8)
    return [np.broadcast_to(value, (TINY[1], TINY[0], 3)).copy()] * frames


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIDREASON_TRACEBACK", raising=False)
    return tmp_path


@pytest.fixture
def fake_probe(monkeypatch):
    """Takes a file's text for its content and ``bad`` for damage; for tests that are not about reading clips."""

    def probe(paths, workers, timeout):
        for path, _ in paths:
            text = path.read_text() if path.is_file() else "bad: no such file"
            if text.startswith("bad"):
                yield Unreadable(text.partition(": ")[2])
            else:
                yield ClipProbe(f"sha-{text}", 60, 10.0, 320, 240, partial=text.startswith("partial"))

    monkeypatch.setattr("vidreason.datamodules.sources.probing.probe_clips", probe)


def write(folder, names):
    for number, name in enumerate(names):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{folder}{number}")


def classes(folder, n, names=("run", "walk")):
    write(folder, [f"{name}/{i}.mp4" for name in names for i in range(n)])


def rows(path):
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def test_a_folder_of_real_clips_becomes_what_the_other_commands_read(here, write_clip, capsys):
    """The whole way once, with every oddity of names, real probing and the data module behind it."""
    source = here / "my clips"
    for label in ("Gehen (übt)", "no", "run"):
        for i in range(5):
            write_clip(source / label / f"clip {i} ä.MP4", colour(zlib.crc32(f"{label}{i}".encode())))
    for hidden in ("_skip", ".hidden"):
        write_clip(source / hidden / "x.mp4", colour(1))
    (source / "no" / "zero.mp4").touch()
    (source / "no" / "notes.txt").write_text("x")
    shutil.copy(source / "no" / "clip 0 ä.MP4", source / "no" / "copy.mp4")
    os.symlink(source / "run" / "clip 1 ä.MP4", source / "run" / "link.mp4")
    before = snapshot(source)
    assert main(["init", "my clips", "--out", "my task", "--workers", "1"]) == 0
    assert snapshot(source) == before, "nothing is written into the source"
    out = capsys.readouterr().out
    assert sorted(path.name for path in (here / "my task").iterdir()) == [
        "README.txt",
        "data.yaml",
        "manifest.csv",
        "task.yaml",
        "unreadable.csv",
    ]
    listed = rows("my task/manifest.csv")
    assert len(listed) == 17
    assert {row["label"] for row in listed} == {"Gehen (übt)", "no", "run"}
    assert all((here / "my task" / row["path"]).is_file() for row in listed)
    by_id = {row["video_id"]: row for row in listed}
    for one, other in (("no/clip 0 ä.MP4", "no/copy.mp4"), ("run/clip 1 ä.MP4", "run/link.mp4")):
        assert (by_id[one]["group"], by_id[one]["split"]) == (by_id[other]["group"], by_id[other]["split"])
    first = by_id["run/clip 1 ä.MP4"]
    assert (first["clip_seconds"], first["clip_frames"], first["clip_width"]) == ("0.400", "4", "48")
    (bad,) = rows("my task/unreadable.csv")
    assert (bad["video_id"], bad["reason"]) == ("no/zero.mp4", "the file is empty")
    for words in (".hidden, _skip", "1 .txt", "no/zero.mp4: the file is empty", "17 of 18 clips can be read"):
        assert words in out

    content = yaml.safe_load((here / "my task" / "data.yaml").read_text(encoding="utf-8"))
    options = content["init_args"]
    data = ManifestDataModule(options["manifest"], options["task"])
    data.setup("fit")
    assert data.label_names == ("Gehen (übt)", "no", "run")
    assert {split: len(data.clips(split)) for split in ("train", "val", "cal", "test")} == {
        split: sum(row["split"] == split for row in listed) for split in ("train", "val", "cal", "test")
    }
    assert data._made == (), "nothing is left to be made"
    commands = [line.strip() for line in out.splitlines() if line.startswith("  vidreason ")]
    assert [shlex.split(line)[1] for line in commands] == ["pipeline", "classify"]
    assert shlex.split(commands[0])[5] == "my task/data.yaml"
    assert all(f"    {line}" in (here / "my task" / "README.txt").read_text(encoding="utf-8") for line in commands)


def test_the_data_section_goes_into_a_stage(here, fake_probe):
    classes("clips", 8)
    assert main(["init", "clips", "--out", "task"]) == 0
    os.chdir("/")  # the files are found from any folder
    data = build("fit", ["--config", "configs/sft_label.yaml", "--data", str(here / "task" / "data.yaml")]).datamodule
    data.setup("fit")
    assert sum(len(data.clips(name)) for name in data.splits()) == 16
    assert data.clips("train")[0].path.is_file()


def test_unreadable_clips_are_set_aside_and_come_back(here, fake_probe, capsys):
    classes("clips", 6)
    Path("clips/run/0.mp4").write_text("bad: the index is gone")
    assert main(["init", "clips", "--out", "task"]) == 0
    assert [row["reason"] for row in rows("task/unreadable.csv")] == ["the index is gone"]
    assert "run/0.mp4" not in {row["video_id"] for row in rows("task/manifest.csv")}
    assert main(["init", "clips", "--out", "task"]) == 2
    assert "task/manifest.csv exists; give --force" in capsys.readouterr().err
    Path("clips/run/0.mp4").write_text("mended")
    assert main(["init", "clips", "--out", "task", "--force"]) == 0
    assert not Path("task/unreadable.csv").exists()
    assert len(rows("task/manifest.csv")) == 12


def test_given_splits_stay_and_cal_comes_out_of_train(here, fake_probe, capsys):
    for split, n in (("Train", 8), ("validation", 2), ("TEST", 3), ("night", 1)):
        write(f"clips/{split}", [f"{name}/{i}.mp4" for name in "ab" for i in range(n)])
    assert main(["init", "clips", "--out", "task"]) == 0
    by_split = {}
    for row in rows("task/manifest.csv"):
        by_split.setdefault(row["split"], []).append(row["video_id"].partition("/")[0])
    assert {split: set(homes) for split, homes in by_split.items()} == {
        "train": {"Train"},
        "cal": {"Train"},
        "val": {"validation"},
        "test": {"TEST"},
        "night": {"night"},
    }
    assert len(by_split["train"]) + len(by_split["cal"]) == 16
    assert yaml.safe_load(Path("task/data.yaml").read_text())["init_args"]["test_splits"] == ["test", "night"]
    assert "(made by seed 0: cal;" in capsys.readouterr().out
    assert main(["init", "clips", "--out", "anew", "--new-splits", "--seed", "3"]) == 0
    assert {row["split"] for row in rows("anew/manifest.csv")} == {"train", "val", "cal", "test"}


def test_a_table_keeps_its_columns_and_groups(here, fake_probe):
    write("v", [f"{i}.mp4" for i in range(24)])
    lines = ["file;what;person;clip_fps;path"]
    lines += [f"v/{i}.mp4;{'ab'[i % 2]};p{i // 4};{i};note {i}" for i in range(24)]
    Path("t.csv").write_text("\n".join(lines))
    argv = ["init", "t.csv", "--out", "task", "--path-column", "file", "--label-column", "what"]
    assert main([*argv, "--group-column", "person"]) == 0
    found = rows("task/manifest.csv")
    assert [row["path_original"] for row in found] == [f"note {i}" for i in range(24)]
    assert [row["group"] for row in found] == [f"p{i // 4}" for i in range(24)]
    assert {row["clip_fps"] for row in found} == {"10.000"}, "what was measured counts"
    homes = {}
    for row in found:
        assert homes.setdefault(row["group"], row["split"]) == row["split"]
    assert main(["init", "task/manifest.csv", "--out", "again"]) == 0, "its own output is a source too"
    assert [row["split"] for row in rows("again/manifest.csv")] == [row["split"] for row in found]


def test_the_task_file_marks_what_to_edit(here, fake_probe):
    write("v", [f"{i}.mp4" for i in range(8)])
    labels = ['yes: "it is"', "no", "null", "3"]
    records = [
        {
            "messages": [
                {"role": "user", "content": "<video>Is it: #1?"},
                {"role": "assistant", "content": labels[i % 4]},
            ],
            "videos": [f"v/{i}.mp4"],
        }
        for i in range(8)
    ]
    Path("c.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert main(["init", "c.jsonl", "--out", "task"]) == 0
    task = Task.from_yaml("task/task.yaml")
    assert task.label_names == tuple(sorted(labels))
    assert task.question == "Is it: #1?"
    assert Path("task/task.yaml").read_text().count("# EDIT") == 5


def test_few_clips_and_odd_labels_are_pointed_out(here, fake_probe, capsys):
    classes("clips", 12, ("0", "1"))
    classes("clips", 2, ("2",))
    shutil.copy("clips/0/1.mp4", "clips/1/same.mp4")
    Path("clips/0/2.mp4").write_text("partial")
    assert main(["init", "clips", "--out", "task"]) == 0
    out = capsys.readouterr().out
    assert "2: 2 clips, none in val, cal" in out
    assert "the labels are numbers" in out
    assert "different labels for the same clip, correct or remove one: 0/1.mp4 (0), 1/same.mp4 (1)" in out
    assert "1 clip damaged" in out
    assert "\n  0: " not in out.partition("too few")[2], "twelve are enough"


def test_a_name_that_is_no_text_is_set_aside(here, fake_probe, capsys):
    classes("clips", 6)
    Path(os.fsdecode(b"clips/run/\xff.mp4")).write_text("x")
    assert main(["init", "clips", "--out", "task"]) == 0
    (bad,) = rows("task/unreadable.csv")
    assert bad["reason"] == "its name is not UTF-8; rename it"
    assert bad["video_id"] == "run/\\udcff.mp4"
    Path(os.fsdecode(b"clips/\xfe")).mkdir()
    Path(os.fsdecode(b"clips/\xfe/1.mp4")).write_text("y")
    assert main(["init", "clips", "--out", "other"]) == 2
    assert "rename it; repair them, or remove" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["clips", "clips/task", "clips/run/../task", "link/task"])
def test_the_source_is_never_written_into(here, fake_probe, capsys, out):
    classes("clips", 6)
    os.symlink("clips", "link")
    before = snapshot(Path("clips"))
    assert main(["init", "clips", "--out", out]) == 2
    assert "stays as it is" in capsys.readouterr().err
    assert snapshot(Path("clips")) == before


def test_a_table_is_not_overwritten_either(here, fake_probe, capsys):
    write(".", [f"v/{i}.mp4" for i in range(8)])
    text = "path,label\n" + "".join(f"v/{i}.mp4,{'ab'[i % 2]}\n" for i in range(8))
    Path("manifest.csv").write_text(text)
    assert main(["init", "manifest.csv", "--out", ".", "--force"]) == 2
    assert "would overwrite manifest.csv" in capsys.readouterr().err
    assert Path("manifest.csv").read_text() == text


def test_a_full_disk_is_one_line(here, fake_probe, capsys, monkeypatch):
    classes("clips", 6)

    def full(path, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["init", "clips", "--out", "task"]) == 1
    error = capsys.readouterr().err
    assert "the disk is full; free some space" in error
    assert error.count("\n") == 1
    with pytest.raises(OSError, match="No space left"):
        main(["init", "clips", "--out", "task", "--traceback"])


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--where", "x"], "COLUMN=VALUE"), (["--timeout", "0"], "must be positive"), (["--label", "x"], "--label")],
)
def test_wrong_options(here, capsys, options, message):
    classes("clips", 6)
    assert main(["init", "clips", "--out", "task", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("task").exists()


@pytest.mark.slow
def test_the_folders_of_real_actions_are_read(here, test_data, capsys):
    clips = test_data / "real_clips"
    assert main(["init", str(clips / "weizmann_silhouettes"), "--out", "task", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "_robustness_walk" in out
    assert len(rows("task/manifest.csv")) == 93


def test_the_manifest_of_real_actions_is_read(here, test_data):
    clips = test_data / "real_clips"
    argv = ["init", str(clips / "manifest.csv"), "--out", "task2", "--workers", "1"]
    assert main([*argv, "--where", "subset=weizmann_silhouettes"]) == 0
    sizes = Counter(row["split"] for row in rows("task2/manifest.csv"))
    assert sizes == {"train": 40, "cal": 10, "val": 13, "test": 30, "robustness": 20}


@pytest.mark.slow
def test_a_thousand_clips(here, write_clip, capsys):
    for i in range(1000):
        write_clip(Path("clips", "abcd"[i % 4], f"{i}.mp4"), colour(i, 2), fps=5)
    assert main(["init", "clips", "--out", "task", "--workers", "1"]) == 0
    assert len(rows("task/manifest.csv")) == 1000
    assert "1000 of 1000 clips can be read" in capsys.readouterr().out
