import os
from collections import Counter

import pytest

from vidreason.datamodules.sources.folders import read_layout
from vidreason.datamodules.sources.rows import read_table
from vidreason.datamodules.split_names import ALMOST_SPLITS, STANDARD_SPLITS, standard_split


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(folder):
    layout = read_layout(folder)
    return layout.pattern, sorted((c.split, c.label, c.path.relative_to(folder).as_posix()) for c in layout.clips)


def test_classes_alone(tmp_path):
    touch(tmp_path, "a b/1.mp4", "a b/deep/er/2.MOV", "ü/3.Mkv", "ü/4.zip")
    assert found(tmp_path) == (
        "<class>/<clip>",
        [("", "a b", "a b/1.mp4"), ("", "a b", "a b/deep/er/2.MOV"), ("", "ü", "ü/3.Mkv"), ("", "ü", "ü/4.zip")],
    )


def test_folders_within_a_class_are_named(tmp_path):
    touch(tmp_path, "a/1.mp4", "a/s1/x/2.mp4", "a/s1/y/3.mp4", "b/s2/4.mp4", "b/s3/5.txt")
    layout = read_layout(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in layout.inner] == ["a/s1", "b/s2"]


def test_splits_above_the_classes(tmp_path):
    touch(tmp_path, "Training/a/1.mp4", "Training/b/2.mp4", "val/a/3.mp4", "test/b/4.mp4", "test/b/x/5.mp4")
    pattern, clips = found(tmp_path)
    assert pattern == "<split>/<class>/<clip>"
    assert [(split, label) for split, label, _ in clips] == [
        ("Training", "a"),
        ("Training", "b"),
        ("test", "b"),
        ("test", "b"),
        ("val", "a"),
    ]


def test_splits_below_the_classes(tmp_path):
    touch(tmp_path, "a/train/1.mp4", "a/test/2.mp4", "b/train/deep/3.mp4")
    assert found(tmp_path) == (
        "<class>/<split>/<clip>",
        [("test", "a", "a/test/2.mp4"), ("train", "a", "a/train/1.mp4"), ("train", "b", "b/train/deep/3.mp4")],
    )
    columns = read_table(tmp_path).columns
    assert columns == ("path", "label", "split")


def test_a_further_folder_beside_train_is_a_test_set_only_if_it_shares_a_class(tmp_path):
    touch(tmp_path, "train/a/1.mp4", "train/b/1.mp4", "night/a/1.mp4")
    assert read_layout(tmp_path).pattern == "<split>/<class>/<clip>"
    touch(tmp_path, "bus/session1/1.mp4")
    assert read_layout(tmp_path).pattern == "<class>/<clip>", "train and bus are vehicles"


def test_a_class_called_train_is_a_class(tmp_path):
    touch(tmp_path, "train/1.mp4", "bus/1.mp4", "test/1.mp4")
    assert {clip.label for clip in read_layout(tmp_path).clips} == {"train", "bus", "test"}


def test_a_lone_folder_is_passed_through(tmp_path):
    touch(tmp_path, "UCF-101/a/1.mp4", "UCF-101/b/1.mp4", "readme.txt")
    layout = read_layout(tmp_path)
    assert layout.home == tmp_path / "UCF-101"
    assert {clip.label for clip in layout.clips} == {"a", "b"}
    touch(tmp_path, "other/1.mp4")
    assert {clip.label for clip in read_layout(tmp_path).clips} == {"UCF-101", "other"}


def test_what_is_no_clip_is_counted_and_named(tmp_path):
    touch(tmp_path, "a/1.mp4", "a/.2.mp4", "a/n.txt", "a/m.TXT", "a/_x/3.mp4", "b/4.mp4", "loose.mp4", "c/readme")
    touch(tmp_path, "_skip/1.mp4", ".git/1.mp4", "._1.mp4")
    layout = read_layout(tmp_path)
    assert sorted(clip.path.name for clip in layout.clips) == ["1.mp4", "4.mp4"]
    assert [path.relative_to(tmp_path).as_posix() for path in layout.passed_over] == [".git", "_skip", "a/_x"]
    assert [path.name for path in layout.empty] == ["c"]
    assert [path.name for path in layout.loose] == ["loose.mp4"]
    assert layout.others == Counter({".txt": 2, "readme": 1})


def test_links_are_followed_once(tmp_path):
    touch(tmp_path, "pool/1.mp4", "clips/b/2.mp4")
    os.symlink(tmp_path / "pool", tmp_path / "clips" / "a")
    os.symlink(tmp_path / "pool" / "1.mp4", tmp_path / "clips" / "b" / "link.mp4")
    (tmp_path / "clips" / "b" / "round").symlink_to(tmp_path / "clips" / "b")
    names = sorted(
        clip.path.relative_to(tmp_path / "clips").as_posix() for clip in read_layout(tmp_path / "clips").clips
    )
    assert names == ["a/1.mp4", "b/2.mp4", "b/link.mp4"]


def test_a_pipe_is_no_clip(tmp_path):
    touch(tmp_path, "a/1.mp4", "b/1.mp4")
    os.mkfifo(tmp_path / "a" / "2.mp4")
    assert len(read_layout(tmp_path).clips) == 2


@pytest.mark.parametrize(("names", "message"), [((), "holds no folders"), (("1.mp4",), "1 clips but no folders")])
def test_folders_are_needed(tmp_path, names, message):
    touch(tmp_path, *names)
    with pytest.raises(ValueError, match=message):
        read_layout(tmp_path)


def test_split_names_lead_to_standard_ones():
    assert {standard_split(name.upper()) for name in ALMOST_SPLITS} == set(STANDARD_SPLITS)
    assert standard_split(" night ") == "night"
