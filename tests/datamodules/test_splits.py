import csv
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from vidreason.datamodules.splits import (
    DEFAULT_FRACTIONS,
    check_disjoint,
    complete_splits,
    limit_clips,
    make_splits,
    write_splits,
)
from vidreason.datamodules.types import Clip


def clips(groups: int, size: int = 4, classes: int = 2, seed: int = 0) -> list[Clip]:
    rng = random.Random(seed)
    return [
        Clip(
            Path(f"{g}_{i}.mp4"),
            f"class{rng.randrange(classes)}",
            f"{g}_{i}",
            group=f"g{g}",
            where=f"m.csv, row {g}{i}",
        )
        for g in range(groups)
        for i in range(rng.randint(1, size))
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("groups", [4, 7, 60])
def test_splits_share_no_group_and_lose_no_clip(groups, seed):
    everything = clips(groups, seed=seed)
    splits = make_splits(everything, DEFAULT_FRACTIONS, seed)
    assert list(splits) == ["train", "val", "cal", "test"]
    assert all(splits.values())
    assert sorted(c.video_id for part in splits.values() for c in part) == sorted(c.video_id for c in everything)
    homes = {c.group: {name for name, part in splits.items() for d in part if d.group == c.group} for c in everything}
    assert all(len(names) == 1 for names in homes.values())
    assert all(c.split == name for name, part in splits.items() for c in part)


def test_splits_are_stratified_and_of_the_size_wanted():
    singles = [replace(c, group="") for c in clips(200, size=1, classes=4)]
    splits = make_splits(singles, {"val": 0.1, "cal": 0.1, "test": 0.2}, seed=1)
    total = Counter(c.label for c in singles)
    for name, share in (("train", 0.6), ("val", 0.1), ("cal", 0.1), ("test", 0.2)):
        found = Counter(c.label for c in splits[name])
        for label, count in total.items():
            assert abs(found[label] - share * count) <= 1.5


def test_unequal_groups_stay_near_their_shares():
    everything = clips(40, size=9, classes=3, seed=4)
    splits = make_splits(everything, {"test": 0.25}, seed=0)
    assert 0.2 <= len(splits["test"]) / len(everything) <= 0.3


def test_splits_depend_on_the_seed_and_not_on_the_order():
    everything = clips(30)
    first = make_splits(everything, DEFAULT_FRACTIONS, 0)
    again = make_splits(everything[::-1], DEFAULT_FRACTIONS, 0)
    assert {n: {c.video_id for c in p} for n, p in first.items()} == {
        n: {c.video_id for c in p} for n, p in again.items()
    }
    assert first != make_splits(everything, DEFAULT_FRACTIONS, 1)


def test_a_class_in_one_group_stays_in_train():
    everything = [*clips(12), Clip(Path("r.mp4"), "rare", "r", group="lonely")]
    for seed in range(10):
        assert any(c.label == "rare" for c in make_splits(everything, DEFAULT_FRACTIONS, seed)["train"])


def test_too_few_groups_or_odd_fractions():
    with pytest.raises(ValueError, match="3 groups cannot fill train, val, cal, test"):
        make_splits(clips(3), DEFAULT_FRACTIONS, 0)
    for fractions in ({"val": 0.5, "test": 0.5}, {"val": -0.1}, {"train": 0.5}):
        with pytest.raises(ValueError, match="fractions"):
            make_splits(clips(9), fractions, 0)


def given(groups: int) -> dict[str, list[Clip]]:
    train = clips(groups)
    test = [replace(c, split="test", video_id=f"t{c.video_id}", group=f"t{c.group}") for c in clips(5, seed=9)]
    return {"train": [replace(c, split="train") for c in train], "odd": [], "test": test}


def test_val_and_cal_come_out_of_train_by_whole_groups():
    before = given(12)
    splits, made = complete_splits(before, DEFAULT_FRACTIONS, 0)
    assert made == ("val", "cal")
    assert list(splits) == ["train", "val", "cal", "test"]
    assert splits["test"] == tuple(before["test"])
    parts = [splits[name] for name in ("train", "val", "cal")]
    assert sorted(c.video_id for part in parts for c in part) == sorted(c.video_id for c in before["train"])
    assert not set.intersection(*({c.group for c in part} for part in parts))
    check_disjoint(splits)


def test_only_what_is_missing_is_made():
    before = given(12)
    before["val"] = [replace(before["test"].pop(), split="val", group="v")]
    splits, made = complete_splits(before, DEFAULT_FRACTIONS, 0)
    assert made == ("cal",)
    assert splits["val"] == tuple(before["val"])
    assert complete_splits(splits, DEFAULT_FRACTIONS, 0) == (splits, ())


def test_train_of_one_group_is_left_alone(caplog):
    splits, made = complete_splits(given(1), DEFAULT_FRACTIONS, 0)
    assert made == ()
    assert set(splits) == {"train", "test"}
    assert "too few groups" in caplog.text


def test_overlap_is_refused_with_its_rows():
    splits, _ = complete_splits(given(6), DEFAULT_FRACTIONS, 0)
    train, test = splits["train"], splits["test"]
    with pytest.raises(
        ValueError, match=rf"duplicate video_id: m\.csv, row \d+: '{train[0].video_id}', as in m\.csv, row"
    ):
        check_disjoint({"train": train, "test": (*test, replace(train[0], split="test"))})
    torn = replace(test[0], group=train[0].group)
    with pytest.raises(ValueError, match=rf"two splits.*'{train[0].group}' in test, but in train in m\.csv"):
        check_disjoint({"train": train, "test": (torn, *test[1:])})


def test_limit_is_balanced_seeded_and_ordered():
    many = [Clip(Path("x"), label, f"{label}{i}") for i in range(30) for label in ("a", "b", "c")]
    few = [Clip(Path("x"), "d", "d0")]
    kept = limit_clips([*many, *few], 10, seed=0)
    assert Counter(c.label for c in kept) == {"a": 3, "b": 3, "c": 3, "d": 1}
    assert [c for c in [*many, *few] if c in kept] == list(kept)
    assert kept == limit_clips([*many, *few], 10, seed=0) != limit_clips([*many, *few], 10, seed=1)
    assert limit_clips(few, 10, seed=0) == tuple(few)
    assert len(limit_clips(many, 2, seed=0)) == 2


def test_splits_are_written_down(tmp_path):
    splits, _ = complete_splits(given(6), DEFAULT_FRACTIONS, 0)
    write_splits(tmp_path / "run" / "splits.csv", splits)
    with (tmp_path / "run" / "splits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(r["video_id"], r["split"], r["group"], r["label"]) for r in rows} == {
        (c.video_id, name, c.group, c.label) for name, part in splits.items() for c in part
    }
