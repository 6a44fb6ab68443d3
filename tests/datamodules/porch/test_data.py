"""PorchDataModule: rendered once as files and a manifest, read back as any user's clips are."""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from vidreason.datamodules.porch.data import PorchDataModule
from vidreason.datamodules.porch.texts import read_facts
from vidreason.datamodules.porch.world import ABNORMAL, LABELS, Facts, label_of
from vidreason.datamodules.prompts import LabelView
from vidreason.datamodules.types import Encoded, EncodedPrompts, Example, TextBatch

SMALL: dict[str, Any] = {"train_clips": 8, "val_clips": 8, "cal_clips": 4, "test_clips": 8, "levels": [0, 4]}


class PixelEncoder:
    """Passes frames on as the only input, and the number of letters of each text as its only token."""

    def encode(self, examples: Sequence[Example]) -> Encoded:
        frames = torch.stack([example.sample.frames for example in examples])
        texts = [(owner, text) for owner, example in enumerate(examples) for text in example.texts]
        ids = torch.tensor([[len(text.text)] for _, text in texts], dtype=torch.long).reshape(len(texts), 1)
        mask = torch.ones_like(ids, dtype=torch.bool)
        owner = torch.tensor([owner for owner, _ in texts], dtype=torch.long)
        rows = TextBatch(ids, mask, mask, ~mask, owner, torch.full_like(owner, -1))
        return Encoded(EncodedPrompts({"frames": frames}, len(examples), torch.zeros(0, dtype=torch.long)), rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("porch")


def porch(folder: Path, **changed: Any) -> PorchDataModule:
    return PorchDataModule(data_dir=str(folder), encoder=PixelEncoder(), **{**SMALL, **changed})


def touch(_: PorchDataModule, path: Path, item: object) -> None:
    """Writes an empty file in the place of a clip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def rows_of(data: PorchDataModule) -> list[dict[str, str]]:
    with (data.folder / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_files_manifest_and_facts(folder: Path) -> None:
    data = porch(folder)
    data.prepare_data()
    rows = rows_of(data)
    assert Counter(row["split"] for row in rows) == {"train": 8, "val": 8, "cal": 4, "test_L0": 8, "test_L4": 8}
    assert all((data.folder / row["path"]).stat().st_size > 500 for row in rows)
    assert sorted(rows[0]) == ["group", "label", "path", "split", "video_id"], "facts are no metadata"
    assert Counter(row["label"] for row in rows if row["split"] == "train") == dict.fromkeys(LABELS, 1)
    facts = data.facts()
    assert facts.keys() == {row["video_id"] for row in rows}
    assert all(label_of(Facts(**facts[row["video_id"]])) == row["label"] for row in rows)
    for line in (data.folder / "facts.jsonl").read_text(encoding="utf-8").splitlines():
        written = json.loads(line)
        assert read_facts(written["rationale"]) == written["facts"]


def test_twins_share_a_group_and_differ_in_label(folder: Path) -> None:
    data = porch(folder)
    data.setup("test")
    assert data.test_split_names == ("test_L0", "test_L4")
    for split in data.test_split_names:
        groups: dict[str, list[str | None]] = {}
        for clip in data.clips(split):
            groups.setdefault(clip.group, []).append(clip.label)
        assert all(len(labels) == len(set(labels)) == 2 for labels in groups.values())
        assert Counter(label for labels in groups.values() for label in labels) == dict.fromkeys(LABELS, 1)


def test_read_back_through_the_ordinary_path(folder: Path) -> None:
    data = porch(folder, batch_size=4, eval_batch_size=8)
    data.connect(train_view=LabelView(data.task))
    data.setup("fit")
    assert data.label_names == LABELS
    seen: list[str] = []
    for batch in data.train_dataloader():
        assert batch.prompts.inputs["frames"].shape == (4, 12, 3, 64, 96)
        assert batch.prompts.inputs["frames"].float().std() > 10
        assert batch.failed == ()
        assert batch.texts.ids[:, 0].tolist() == [len(LABELS[label]) for label in batch.labels]
        assert all(clip.fields == {} for clip in batch.clips), "nothing but the video reaches a prompt"
        seen += batch.video_ids
    assert sorted(seen) == [f"train/{i:05d}" for i in range(8)]
    assert [len(loader.dataset) for loader in data.test_dataloader()] == [8, 8]
    assert len(next(iter(data.val_dataloader()[0])).labels) == 8


def test_a_second_use_renders_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = porch(folder)
    first.prepare_data()
    clips = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*.mp4")}
    monkeypatch.setattr(PorchDataModule, "_write_clip", lambda *_: pytest.fail("rendered again"))
    again = porch(folder, batch_size=3, num_workers=0, seed=0)
    again.prepare_data()
    again.setup("fit")
    assert again.folder == first.folder
    assert {path: path.stat().st_mtime_ns for path in again.folder.rglob("*.mp4")} == clips
    assert not list(folder.glob("*.part*"))


def test_an_interrupted_rendering_is_not_taken_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = porch(tmp_path, levels=[])
    whole = PorchDataModule._write_clip

    def breaks(self: PorchDataModule, path: Path, item: Any) -> None:
        if item.split == "val":
            raise KeyboardInterrupt
        whole(self, path, item)

    monkeypatch.setattr(PorchDataModule, "_write_clip", breaks)
    with pytest.raises(KeyboardInterrupt):
        data.prepare_data()
    assert not data.manifest.exists()
    monkeypatch.setattr(PorchDataModule, "_write_clip", whole)
    data.prepare_data()
    assert len(rows_of(data)) == len(list(data.folder.rglob("*.mp4"))) == 20


@pytest.mark.parametrize(
    "changed",
    [
        {"train_clips": 9},
        {"test_clips": 10},
        {"levels": [0]},
        {"camera": "mono"},
        {"policy": True},
        {"shortcut": 0.5},
        {"label_noise": 0.1},
        {"world_seed": 1},
        {"seed": 1},
    ],
    ids=str,
)
def test_what_the_clips_depend_on_names_their_folder(folder: Path, changed: dict[str, Any]) -> None:
    assert porch(folder, **changed).folder != porch(folder).folder


def test_seed_shuffles_alone_where_the_world_has_its_own(folder: Path) -> None:
    assert porch(folder, world_seed=0, seed=5).folder == porch(folder).folder


def test_the_same_seed_gives_the_same_files_elsewhere(folder: Path, tmp_path: Path) -> None:
    one, other = porch(folder), porch(tmp_path)
    for data in (one, other):
        data.prepare_data()
    assert one.folder.name == other.folder.name
    for path in ("manifest.csv", "facts.jsonl", "clips/train/00003.mp4", "clips/test_L4/0001b.mp4"):
        assert (one.folder / path).read_bytes() == (other.folder / path).read_bytes()


def test_label_noise_is_in_train_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PorchDataModule, "_write_clip", touch)  # the manifest alone is of interest
    noisy = porch(folder, train_clips=200, label_noise=0.3)
    noisy.prepare_data()
    truth = {name: label_of(Facts(**facts)) for name, facts in noisy.facts().items()}
    wrong = Counter(row["split"] for row in rows_of(noisy) if row["label"] != truth[row["video_id"]])
    assert set(wrong) == {"train"}
    assert 40 <= wrong["train"] <= 80
    assert {row["label"] for row in rows_of(noisy)} == set(LABELS)


def test_policy_labels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PorchDataModule, "_write_clip", touch)
    data = porch(folder, policy=True)
    data.setup("fit")
    assert data.label_names == ("normal", "abnormal")
    facts = data.facts()
    for split in ("train", "val", "test_L0"):
        for clip in data.clips(split):
            bad = label_of(Facts(**facts[clip.video_id])) in ABNORMAL
            assert clip.label == ("abnormal" if bad else "normal")
        assert Counter(clip.label for clip in data.clips(split)) == {"normal": 4, "abnormal": 4}


def test_a_monochrome_camera_writes_grey_files(tmp_path: Path) -> None:
    data = porch(tmp_path, camera="mono", train_clips=1, val_clips=1, cal_clips=1, levels=[])
    data.connect(train_view=LabelView(data.task))
    frames = next(iter(data.loader("train", LabelView(data.task)))).prompts.inputs["frames"].int()
    assert (frames.amax(2) - frames.amin(2)).max() <= 3, "grey, but for what compression adds"
    assert frames.float().std() > 10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"test_clips": 7}, "even"),
        ({"levels": [0, 5]}, "within 0..4"),
        ({"shortcut": 1.5}, "shares"),
        ({"label_noise": -0.1}, "shares"),
    ],
)
def test_refuses_nonsense(folder: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        porch(folder, **wrong)
