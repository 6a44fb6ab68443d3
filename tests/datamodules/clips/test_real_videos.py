"""Real clips and deliberately odd files, where the environment names their folder."""

import csv
import sys
from itertools import combinations

import numpy as np
import pytest

from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.datamodules.clips.decoding import FrameOptions, decode
from vidreason.datamodules.clips.reading import read_frames
from vidreason.datamodules.manifest import ManifestDataModule


def odd_files(folder):
    with (folder / "odd_videos" / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("reader", ["auto", pytest.param("pyav", marks=pytest.mark.slow)])
def test_odd_files_decode_or_say_why(test_data, reader):
    wrong = []
    for row in odd_files(test_data):
        path = test_data / "odd_videos" / row["path"]
        try:
            video = read_frames(path, FrameOptions(num_frames=8, max_pixels=20_000, reader=reader))
        except DecodeError as error:
            if row["expect"] in ("ok", "partial") or row["path"].rpartition("/")[2] not in str(error):
                wrong.append(f"{row['path']} ({row['expect']}): {error}")
            continue
        if row["expect"] in ("reject", "no_video") or len(video.frames) != 8:
            wrong.append(f"{row['path']} ({row['expect']}): {tuple(video.frames.shape)} by {video.reader}")
    assert not wrong


def test_tolerant_reading_finds_the_frames_that_are_there(test_data):
    counts = {}
    for row in odd_files(test_data):
        if row["expect"] in ("ok", "partial") and not row["path"].endswith((".zip", "nasa_13013.mp4")):
            path = test_data / "odd_videos" / row["path"]
            video = read_frames(path, FrameOptions(num_frames=1, max_pixels=1000, reader="pyav"))
            counts[row["path"]] = (video.frames_in_file, int(row["frames_tolerant"]))
    assert {path: pair for path, pair in counts.items() if pair[0] != pair[1]} == {}
    assert len(counts) > 40


def frames_of(path, reader):
    try:
        return decode(path, FrameOptions(num_frames=8, max_pixels=20_000, reader=reader)).pixels
    except DecodeError:
        return None


@pytest.mark.slow
def test_all_readers_return_the_same_frames(test_data):
    """Rotated, 10-bit, interlaced, variable rate, damaged: all that more than one reader accepts."""
    different, pairs = [], 0
    for row in odd_files(test_data):
        path = test_data / "odd_videos" / row["path"]
        read = [frames_of(path, reader) for reader in ("auto", "pyav", "decord")]
        for one, other in combinations([frames for frames in read if frames is not None], 2):
            pairs += 1
            if not np.array_equal(one, other):
                different.append(row["path"])
    assert different == []
    assert pairs > 60


@pytest.mark.slow
def test_torchcodec_returns_the_frames_of_the_others(test_data, write_clip, tmp_path):
    """Plain files, where torchcodec can be loaded; it needs FFmpeg's libraries, which are not on every machine."""
    pytest.importorskip("torchcodec", reason="the extra vidreason[torchcodec] is not installed")
    try:
        decode(write_clip(tmp_path / "clip.mp4"), FrameOptions(reader="torchcodec"))
    except DecodeError as error:
        pytest.skip(str(error))
    different, read = [], 0
    for row in odd_files(test_data):
        path = test_data / "odd_videos" / row["path"]
        try:
            taken = decode(path, FrameOptions(num_frames=8, max_pixels=20_000, reader="torchcodec"))
        except DecodeError:
            assert frames_of(path, "pyav") is None, path
            continue
        read += taken.reader == "torchcodec"
        if not np.array_equal(taken.pixels, frames_of(path, "pyav")):
            different.append(row["path"])
    assert different == []
    assert read > 10


def test_a_missing_torchcodec_is_told(write_clip, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(DecodeError, match=r"clip.mp4: torchcodec: .*pip install 'vidreason\[torchcodec\]', or set"):
        decode(write_clip(tmp_path / "clip.mp4"), FrameOptions(reader="torchcodec"))


@pytest.mark.parametrize(
    ("name", "subset", "sizes"),
    [
        ("weizmann", "weizmann_silhouettes", {"train": 40, "val": 13, "cal": 10, "test": 30, "robustness": 20}),
        ("surveillance_fight", "surveillance_fight", {"val": 44, "test": 74}),
        ("utd_mhad_depth", "utd_mhad_depth", {"val": 108, "test": 215}),
    ],
)
def test_real_manifests_are_read(test_data, name, subset, sizes):
    data = ManifestDataModule(
        test_data / "real_clips" / "manifest.csv", task=f"tasks/{name}.yaml", where={"subset": subset}
    )
    data.setup("fit")
    assert {split: len(data.clips(split)) for split in sizes} == sizes
    assert {clip.label for clip in data.clips("train")} == set(data.label_names)
    assert {clip.label for clip in data.clips("cal")} == set(data.label_names)
    groups = [{clip.group for clip in data.clips(split)} for split in data.splits()]
    assert sum(map(len, groups)) == len(set.union(*groups))
