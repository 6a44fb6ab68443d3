import csv
import json
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.manifest import ManifestDataModule
from vidreason.datamodules.task import Task

TASK = "name: door\nquestion: What?\nclasses: [theft, visit, unused]\nmetadata_fields: [camera]\n"


class Folder:
    """A user's folder: empty files stand for clips, since nothing is decoded here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "task.yaml").write_text(TASK)

    def clip(self, name: str) -> str:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        return name

    def rows(self, n: int = 24, **columns: str) -> list[dict[str, str]]:
        return [
            {"path": self.clip(f"clips/{i}.mp4"), "label": ("theft", "visit")[i % 2], "camera": "n", **columns}
            for i in range(n)
        ]

    def write(self, rows: list[dict[str, str]], name: str = "clips.csv") -> Path:
        file = self.path / name
        if file.suffix == ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        else:
            with file.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        return file


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def module(manifest: Path, **options: object) -> ManifestDataModule:
    data = ManifestDataModule(manifest, task=manifest.parent / "task.yaml", **options)
    data.setup("fit")
    return data


def ids(data: ManifestDataModule) -> dict[str, list[str]]:
    return {split: [clip.video_id for clip in data.clips(split)] for split in data.splits()}


@pytest.mark.parametrize("name", ["clips.csv", "clips.jsonl"])
def test_a_manifest_is_read(folder, name):
    rows = folder.rows(3, split="train", group="", note="ü, quoted")
    rows[1] |= {"split": "val", "video_id": "mine"}
    rows[0] |= {"video_id": ""}
    rows[2] |= {"split": "test_night", "video_id": " "}
    data = module(folder.write(rows, name))
    (clip,) = data.clips("val")
    assert (clip.video_id, clip.label, clip.split, clip.group) == ("mine", "visit", "val", "")
    assert clip.path == folder.path / "clips/1.mp4"
    assert clip.fields == {"camera": "n", "note": "ü, quoted"}
    assert clip.where == f"{name}, row {3 if name.endswith('csv') else 2}"
    assert data.clips("train")[0].video_id == "clips/0.mp4"
    assert data.test_split_names == ("test_night",)
    assert data.label_names == ("theft", "visit", "unused")


def test_nothing_is_read_before_setup(folder):
    data = ManifestDataModule(folder.path / "later.csv", task=folder.path / "task.yaml")
    folder.write(folder.rows(24), "later.csv")
    data.setup("fit")
    assert len(data.clips("train")) > 0


def test_paths_and_root(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    rows = folder.rows(24)
    rows[0]["path"] = str(folder.path / rows[0]["path"])
    (elsewhere / "task.yaml").write_text(TASK)
    manifest = Folder(elsewhere).write(rows)
    data = module(manifest, root=folder.path)
    assert all(clip.path.is_file() for split in data.splits() for clip in data.clips(split))
    with pytest.raises(ValueError, match="missing file"):
        module(manifest)


def test_missing_splits_are_made_by_the_seed(folder):
    manifest = folder.write(folder.rows(40))
    first = ids(module(manifest))
    assert set(first) == {"train", "val", "cal", "test"}
    assert all(first.values())
    assert first == ids(module(manifest, seed=5)) != ids(module(manifest, split_seed=1))
    sizes = {split: len(found) for split, found in ids(module(manifest, split_fractions={"test": 0.5})).items()}
    assert (list(sizes), sizes["test"], sum(sizes.values())) == (["train", "val", "cal", "test"], 20, 40)


def test_cal_comes_out_of_train_in_whole_groups(folder):
    rows = folder.rows(40)
    for i, row in enumerate(rows):
        row |= {"split": ("train", "train", "val", "test")[i // 10], "group": f"person{i // 4 if i < 20 else i}"}
    data = module(folder.write(rows))
    before = {row["path"] for row in rows if row["split"] == "train"}
    assert {clip.video_id for clip in (*data.clips("train"), *data.clips("cal"))} == before
    assert not {clip.group for clip in data.clips("train")} & {clip.group for clip in data.clips("cal")}
    assert {clip.video_id for clip in data.clips("val")} == {row["path"] for row in rows if row["split"] == "val"}
    assert len(data.clips("test")) == 10


def test_where_selects_before_anything_is_checked(folder):
    rows = folder.rows(24, subset="mine")
    rows += [{"path": "gone.mp4", "label": "other", "camera": "", "subset": "theirs"}]
    data = module(folder.write(rows), where={"subset": "mine", "camera": "n"})
    assert sum(len(data.clips(split)) for split in data.splits()) == 24


def test_limit_is_per_split_and_balanced(folder):
    rows = folder.rows(40, split="train")
    rows = [row | {"split": "test"} if i >= 30 else row for i, row in enumerate(rows)]
    manifest = folder.write(rows)
    data = module(manifest, limit={"train": 8, "cal": 2})
    assert Counter(clip.label for clip in data.clips("train")) == {"theft": 4, "visit": 4}
    assert len(data.clips("cal")) == 2
    assert len(data.clips("test")) == 10
    assert set(ids(data)["train"]) < set(ids(module(manifest))["train"])
    for limit in ({"tran": 8}, {"train": 0}):
        with pytest.raises(ValueError, match=r"clips\.csv: limit .*train, val, cal, test"):
            module(manifest, limit=limit)


def test_without_a_task_the_labels_are_the_classes(folder):
    data = ManifestDataModule(folder.write(folder.rows(24)))
    assert data.label_names == ("theft", "visit")
    assert data.task.name == "clips"


def test_one_folder_per_class(folder):
    for label in ("theft", "visit", "_drafts", ".cache"):
        for i in range(8):
            folder.clip(f"videos/{label}/{i}.mp4")
    folder.clip("videos/theft/deep/9.AVI")
    folder.clip("videos/theft/notes.txt")
    folder.clip("videos/theft/.hidden.mp4")
    data = ManifestDataModule(folder.path / "videos")
    data.setup("fit")
    found = {clip.video_id: clip.label for split in data.splits() for clip in data.clips(split)}
    wanted = {f"{label}/{i}.mp4": label for label in ("theft", "visit") for i in range(8)}
    assert found == wanted | {"theft/deep/9.AVI": "theft"}
    assert set(data.splits()) == {"train", "val", "cal", "test"}


def test_folders_of_splits(folder):
    for split in ("train", "test", "robustness"):
        for label in ("theft", "visit"):
            for i in range(4):
                folder.clip(f"videos/{split}/{label}/{i}.mp4")
    data = ManifestDataModule(folder.path / "videos", test_splits=["test", "robustness"])
    data.setup("fit")
    assert data.splits() == ("train", "val", "cal", "test", "robustness")
    assert data.test_split_names == ("test", "robustness")
    assert len(data.clips("test")) == 8
    assert sum(len(data.clips(split)) for split in ("train", "val", "cal")) == 8


@pytest.mark.parametrize("name", ["weizmann", "surveillance_fight", "utd_mhad_depth"])
def test_shipped_sections_instantiate(name, tmp_path, monkeypatch):
    monkeypatch.setenv("VIDREASON_TEST_DATA", str(tmp_path))
    parser = ArgumentParser(parser_mode="omegaconf")
    parser.add_subclass_arguments(VideoDataModule, "data")
    section = str(files("vidreason.configs") / "data" / f"{name}.yaml")
    config = parser.parse_args(
        ["--data", section, "--data.predict_splits", "[train, val]", "--data.limit", "{train: 4}"]
    )
    data = config.data.init_args
    assert data.manifest == str(tmp_path / "real_clips" / "manifest.csv")
    built = ManifestDataModule(**{**data.as_dict(), "frames": FrameOptions(**data.frames.as_dict())})
    assert built.predict_splits == ("train", "val")
    assert built.limit == {"train": 4}
    assert len(Task.from_yaml(built.task_file).classes) >= 2


def set_in(rows, index, **values):
    rows[index] |= values
    return rows


MISTAKES = {
    "label": (
        lambda r: set_in(r, 3, label="thef"),
        r"unknown label.*task\.yaml.*row 5: 'thef' \(did you mean 'theft'\?\)",
    ),
    "many": (lambda r: [x | {"label": "bad"} for x in r], r"row 2: .*row 6: 'bad'.*; and 19 more"),
    "no label": (lambda r: set_in(r, 3, label=" "), "no label: row 5"),
    "no path": (lambda r: set_in(r, 3, path=""), "no path: row 5"),
    "missing": (lambda r: set_in(r, 0, path="clips/x.mp4"), r"missing file, .*: row 2: .*clips/x\.mp4"),
    "twice": (lambda r: set_in(r, 4, path="clips/0.mp4"), "duplicate video_id: row 2: 'clips/0.mp4'; row 6"),
    "split": (
        lambda r: [set_in([x], 0, split="train" if i else "")[0] for i, x in enumerate(r)],
        "no split, .*: row 2",
    ),
    "dev": (lambda r: [x | {"split": "dev" if x is r[2] else "train"} for x in r], "row 4: call 'dev' 'val'"),
    "group": (
        lambda r: [x | {"split": "test" if i == 7 else "train", "group": f"g{i // 2}"} for i, x in enumerate(r)],
        r"a group lies in two splits.*row 9: 'g3' in test, but in train in clips\.csv, row 8",
    ),
    "columns": (
        lambda r: [{"file": x["path"], "label": x["label"]} for x in r],
        "no column 'path'; there are file, label",
    ),
    "metadata": (
        lambda r: [{"path": x["path"], "label": x["label"]} for x in r],
        "no column camera, named by metadata",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_file_and_row(folder, mistake):
    change, message = MISTAKES[mistake]
    manifest = folder.write(change(folder.rows(24)))
    with pytest.raises(ValueError, match=message) as caught:
        module(manifest)
    assert str(caught.value).startswith(str(manifest))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"colour": "red"}, "where names no column: 'colour'; there are path, label, camera"),
        ({"camera": "x"}, "it has n"),
    ],
)
def test_where_that_finds_nothing(folder, where, message):
    with pytest.raises(ValueError, match=message):
        module(folder.write(folder.rows(24)), where=where)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", "path,label\na.mp4\n", r"c\.csv, row 2: 1 values for 2 columns"),
        ("c.csv", "path,label\na.mp4,x,y\n", r"c\.csv, row 2: 3 values for 2 columns"),
        ("c.csv", "path,label,label\n", r"c\.csv, row 1: the column 'label' occurs twice"),
        ("c.csv", 'path,label\n"a.mp4,x\n', r"c\.csv, row \d"),
        ("c.csv", "path,label\n", r"c\.csv: lists no clips"),
        ("c.csv", "", r"c\.csv: no column 'path' and no column 'label'; there are none"),
        ("c.jsonl", '{"path": "a.mp4", "label": "x"}\n{"path"\n', r"c\.jsonl, row 2: not JSON"),
        ("c.jsonl", "[1]\n", r"c\.jsonl, row 1: not an object"),
        ("c.txt", "a", r"c\.txt: a manifest ends in \.csv or \.jsonl"),
    ],
)
def test_malformed_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        ManifestDataModule(tmp_path / name).setup("fit")


def test_other_mistakes(folder):
    with pytest.raises(ValueError, match="no such manifest"):
        ManifestDataModule(folder.path / "none.csv").setup("fit")
    (folder.path / "latin.csv").write_bytes("path,label\nä.mp4,x\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.csv: is not UTF-8"):
        ManifestDataModule(folder.path / "latin.csv").setup("fit")
    with pytest.raises(ValueError, match="3 groups cannot fill train, val, cal, test"):
        module(folder.write(folder.rows(3)))
    with pytest.raises(ValueError, match="at least two classes"):
        ManifestDataModule(folder.write(folder.rows(1))).setup("fit")
    (folder.path / "videos" / "theft").mkdir(parents=True)
    with pytest.raises(ValueError, match="a class folder without clips"):
        ManifestDataModule(folder.path / "videos").setup("fit")
    (folder.path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no folders"):
        ManifestDataModule(folder.path / "empty").setup("fit")
