"""Folds of split train: what they hold, on what they depend, and which mistakes are refused."""

from __future__ import annotations

import csv
import random
from collections import Counter
from pathlib import Path

import lightning as L
import pytest

from vidreason.datamodules import base
from vidreason.datamodules.folds import FoldOptions, deal_folds
from vidreason.datamodules.manifest import ManifestDataModule
from vidreason.datamodules.types import Clip


def clips(sizes: dict[str, int], group_of: int = 1) -> list[Clip]:
    """Clips of each class, of which ``group_of`` in turn share a group."""
    return [
        Clip(Path(f"{label}{i}.mp4"), label, f"{label}{i}", "train", f"{label} {i // group_of}" if group_of > 1 else "")
        for label, number in sizes.items()
        for i in range(number)
    ]


def test_folds_hold_every_clip_once_with_all_classes_alike() -> None:
    whole = clips({"a": 13, "b": 7, "c": 4})
    fold_of = deal_folds(whole, 4, seed=3)
    assert fold_of.keys() == {clip.video_id for clip in whole}
    for label, number in (("a", 13), ("b", 7), ("c", 4)):
        sizes = Counter(fold_of[clip.video_id] for clip in whole if clip.label == label)
        assert sorted(sizes) == [1, 2, 3, 4]
        assert set(sizes.values()) <= {number // 4, -(-number // 4)}
    assert set(Counter(fold_of.values()).values()) == {6}


def test_a_group_is_never_divided() -> None:
    whole = clips({"a": 12, "b": 9}, group_of=3)
    fold_of = deal_folds(whole, 3, seed=0)
    assert all(len({fold_of[c.video_id] for c in whole if c.group == group}) == 1 for group in {c.group for c in whole})


def test_folds_depend_on_seed_and_clips_but_not_on_their_order() -> None:
    whole = clips({"a": 12, "b": 12})
    shuffled = random.Random(1).sample(whole, len(whole))
    assert deal_folds(shuffled, 3, seed=0) == deal_folds(whole, 3, seed=0)
    assert deal_folds(whole, 3, seed=1) != deal_folds(whole, 3, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": 1, "leave_out": 1}, "fold.of must be at least 2"),
        ({"of": -2, "only": 1}, "fold.of must be at least 2"),
        ({"leave_out": 1}, "fold.of must be at least 2"),
        ({"of": 3}, "leave_out or only, a number from 1 to 3"),
        ({"of": 3, "leave_out": 1, "only": 1}, "leave_out or only, a number from 1 to 3"),
        ({"of": 3, "only": 4}, "leave_out or only, a number from 1 to 3"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        FoldOptions(**options)
    assert "\n" not in str(caught.value)


def test_folds_that_the_clips_cannot_fill_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"5 folds of train are too many: .* class 'b' are in 3 groups.*at most 3 folds"
    ):
        deal_folds(clips({"a": 9, "b": 9}, group_of=3) + clips({"a": 9}), 5, seed=0)
    with pytest.raises(ValueError, match=r"class 'b' are in 1 group,.*do without folds"):
        deal_folds(clips({"a": 2, "b": 1}), 2, seed=0)
    with pytest.raises(ValueError, match="split train has no clips"):
        deal_folds([], 2, seed=0)


def test_a_data_module_leaves_a_fold_out_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(base, "rank_zero_info", said.append)
    names = {
        split: [f"{split}_{label}{i}.mp4" for label in "ab" for i in range(4)] for split in ("train", "val", "cal")
    }
    rows = [(name, name.split("_")[1][0], split) for split, own in names.items() for name in own]
    for name, _, _ in rows:
        (tmp_path / name).touch()
    with (tmp_path / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])

    def data(fold: FoldOptions) -> ManifestDataModule:
        found = ManifestDataModule(tmp_path / "m.csv", seed=7, fold=fold)  # all seeds share folds
        found.trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path / "run")
        found.setup("fit")
        return found

    with_out, alone = data(FoldOptions(2, leave_out=1)), data(FoldOptions(2, only=1))
    held_out = {clip.video_id for clip in alone.clips("train")}
    fold_of = deal_folds(ManifestDataModule(tmp_path / "m.csv").clips("train"), 2, seed=0)
    assert held_out == {name for name, fold in fold_of.items() if fold == 1}
    assert {clip.video_id for clip in with_out.clips("train")} == set(names["train"]) - held_out
    assert [clip.video_id for clip in with_out.clips("val")] == names["val"]
    data(FoldOptions(2, leave_out=1))
    written_to = tmp_path / "run" / "splits.csv"
    assert said[-1] == f"train in 2 folds, of which fold 1 is held out (4 clips), by seed 0, written to {written_to}"
    with written_to.open(newline="") as file:
        written = {row["video_id"] for row in csv.DictReader(file) if row["split"] == "held_out"}
    assert written == held_out
