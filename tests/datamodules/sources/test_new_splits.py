from pathlib import Path

import pytest

from vidreason.datamodules.sources.new_splits import assign_splits, group_by_content
from vidreason.datamodules.types import Clip


def clips(n, split="", group=lambda i: "", prefix=""):
    return [Clip(Path(f"{prefix}{i}"), "ab"[i % 2], f"{prefix}{i}", split, group(i)) for i in range(n)]


def shas(found):
    return [f"sha{clip.video_id}" for clip in found]


def test_content_is_the_group_where_there_is_none():
    found = clips(4)
    assert [c.group for c in group_by_content(found, ["x", "y", "x", "z"])] == ["x", "y", "x", "z"]


def test_groups_that_share_a_clip_become_one():
    found = clips(6, group=lambda i: ("p", "q", "r", "", "", "q")[i])
    grouped = group_by_content(found, ["1", "2", "1", "2", "3", "4"])
    assert [c.group for c in grouped] == ["p", "q", "p", "q", "3", "q"]
    chain = group_by_content(clips(4, group=lambda i: "abcd"[i]), ["1", "1", "2", "2"])
    assert [c.group for c in chain] == ["a", "a", "c", "c"]
    bridge = group_by_content(clips(4, group=lambda i: "abab"[i]), ["1", "2", "3", "2"])
    assert len({c.group for c in bridge}) == 2
    joined = group_by_content(clips(4, group=lambda i: "abab"[i]), ["1", "2", "2", "4"])
    assert len({c.group for c in joined}) == 1


def test_all_splits_are_made_without_dividing_a_copy():
    found = clips(40)
    same = [f"sha{i // 2}" for i in range(40)]
    assignment = assign_splits(group_by_content(found, same), same, seed=0)
    assert assignment.made == ("train", "val", "cal", "test")
    home = {}
    for split, members in assignment.splits.items():
        assert members
        for clip in members:
            assert home.setdefault(clip.group, split) == split
    assert sum(map(len, assignment.splits.values())) == 40
    other = assign_splits(group_by_content(found, same), same, seed=1)
    assert {c.video_id for c in other.splits["test"]} != {c.video_id for c in assignment.splits["test"]}


def test_missing_splits_come_out_of_train_alone():
    given = clips(20, "train", prefix="t") + clips(4, "val", prefix="v")
    assignment = assign_splits(group_by_content(given, shas(given)), shas(given), 0)
    assert assignment.made == ("cal", "test")
    assert {c.video_id for c in assignment.splits["val"]} == {f"v{i}" for i in range(4)}
    assert sum(len(assignment.splits[name]) for name in ("train", "cal", "test")) == 20
    given = clips(20, "train", prefix="t") + clips(4, "test_night", prefix="n")
    assignment = assign_splits(group_by_content(given, shas(given)), shas(given), 0)
    assert assignment.made == ("val", "cal")
    assert set(assignment.splits) == {"train", "val", "cal", "test_night"}


def test_given_splits_must_not_share_anything():
    given = clips(4, "train", prefix="t") + clips(4, "test", prefix="e")
    content = shas(given)
    content[5] = content[1]
    with pytest.raises(ValueError, match=r"the same clip lies in two splits.*t1 \(train\) and e1 \(test\)"):
        assign_splits(group_by_content(given, content), content, 0)
    torn = clips(4, "train", lambda i: "p", "t") + clips(4, "test", lambda i: "p", "e")
    with pytest.raises(ValueError, match="a group lies in two splits"):
        assign_splits(group_by_content(torn, shas(torn)), shas(torn), 0)
    with pytest.raises(ValueError, match="no split is called train; there are gallery"):
        assign_splits(clips(4, "gallery"), shas(clips(4)), 0)
