"""Parts of videos, and folders of pictures, as clips."""

import csv
import json
import math

import numpy as np
import pytest
from PIL import Image

from vidreason.datamodules.clips import pyav_reader
from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.datamodules.clips.decoding import FrameOptions, decode
from vidreason.datamodules.clips.pyav_packets import seconds, survey
from vidreason.datamodules.clips.sampling import Stretch
from vidreason.datamodules.manifest import ManifestDataModule
from vidreason.datamodules.sources.source import read_source

ALL = FrameOptions(num_frames=64, sampling="fps", fps=10.0)


def shown(read) -> tuple[int, ...]:
    """Reads the index that each frame carries as six stripes."""
    width = read.pixels.shape[2]
    bits = read.pixels[:, 32, [round((i + 0.5) * width / 6) for i in range(6)], 1] > 128
    return tuple(bits @ (1 << np.arange(5, -1, -1)))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize(
    ("start", "end", "wanted"),
    [(2, 4, range(20, 40)), (0, 1.5, range(15)), (5.05, math.inf, range(51, 60)), (3, 99, range(30, 60))],
)
def test_a_stretch_has_the_frames_of_its_seconds(tmp_path, write_clip, suffix, start, end, wanted):
    path = write_clip(tmp_path / f"clip{suffix}", 60, gop=12)
    assert shown(decode(path, ALL, stretch=Stretch(start, end))) == tuple(wanted)
    assert shown(decode(path, FrameOptions(num_frames=1), stretch=Stretch(1.02, 1.04))) == (10,), "shown at its start"


def test_a_stretch_is_sought_and_not_decoded_from_the_start(tmp_path, write_clip):
    path = write_clip(tmp_path / "clip.mp4", 60, gop=12)
    found = survey(path, Stretch(4.0, 4.5))
    assert found.packets < 25
    assert 2 < found.times[0] <= 4.0, "the key frame before it"


def test_a_stretch_behind_the_end_is_refused(tmp_path, write_clip):
    with pytest.raises(DecodeError, match="begins at 7 s, after the last frame at 5.90 s"):
        decode(write_clip(tmp_path / "clip.mp4", 60), ALL, stretch=Stretch(7, 8))


def test_only_needed_parts_of_a_long_video_are_decoded_and_frames_stay_the_same(tmp_path, write_clip):
    grey = [np.full((32, 48, 3), i % 250, np.uint8) for i in range(600)]
    path = write_clip(tmp_path / "long.mp4", grey, gop=25, fps=25)
    few = decode(path, FrameOptions(num_frames=3, reader="pyav"))
    every = decode(path, FrameOptions(num_frames=600, reader="pyav"))
    assert few.indices == (100, 300, 500)
    assert np.array_equal(few.pixels, every.pixels[list(few.indices)])


def test_frames_to_which_none_refers_are_passed_over(tmp_path, write_clip, monkeypatch):
    pytest.importorskip("decord", reason="decord has no wheel for this platform")
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 255, (64, 400, 3), dtype=np.uint8)
    path = write_clip(tmp_path / "long.mp4", [texture[:, i : i + 96] for i in range(160)])  # x264 makes B frames
    whole = decode(path, FrameOptions(num_frames=160, reader="decord")).pixels
    times = []
    monkeypatch.setattr(pyav_reader, "seconds", lambda *given: times.append(given) or seconds(*given))
    read = decode(path, FrameOptions(num_frames=8))
    assert (read.reader, read.why) == ("pyav", "PyAV passes over frames to which no other refers")
    assert np.array_equal(read.pixels, whole[list(read.indices)])
    assert len(times) < 160 + 120, "one for each packet, and one for each decoded frame"


def write_manifest(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_the_parts_of_a_video_are_clips_of_one_group(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "b.mp4").touch()
    rows = [("a.mp4", "x", 0, 2), ("a.mp4", "y", 2, 4.5), ("a.mp4", "x", "", ""), ("b.mp4", "y", "", "")]
    manifest = write_manifest(tmp_path / "m.csv", ("path", "label", "start", "end"), [*rows, ("b.mp4", "x", 7, "")])
    data = ManifestDataModule(manifest, split_fractions={"test": 0.4})
    clips = sorted((clip for split in data.splits() for clip in data.samples(split)), key=lambda c: c.video_id)
    assert [clip.video_id for clip in clips] == ["a.mp4", "a.mp4#t=0,2", "a.mp4#t=2,4.5", "b.mp4", "b.mp4#t=7"]
    assert [clip.group for clip in clips] == ["a.mp4"] * 3 + ["b.mp4"] * 2
    assert [clip.stretch for clip in clips] == [None, Stretch(0, 2), Stretch(2, 4.5), None, Stretch(7)]
    assert len({clip.split for clip in clips[:3]}) == 1
    assert clips[1].fields == {}


@pytest.mark.parametrize(
    ("start", "end", "reason"),
    [("1:30", "2", "start '1:30': is no number"), ("3", "3", "got 3"), ("-1", "2", "got -1")],
)
def test_a_bad_stretch_names_its_row(tmp_path, start, end, reason):
    (tmp_path / "a.mp4").touch()
    manifest = write_manifest(
        tmp_path / "m.csv", ("path", "label", "start", "end"), [("a.mp4", "x", start, end), ("a.mp4", "y", 0, 1)]
    )
    for read in (lambda: ManifestDataModule(manifest).splits(), lambda: read_source(manifest)):
        with pytest.raises(ValueError, match=f"row 2: .*{reason}"):
            read()


def test_chat_records_have_stretches(tmp_path):
    (tmp_path / "a.mp4").touch()
    turns = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "walk"}]
    records = [{"messages": turns, "videos": ["a.mp4"], "start": 2 * i, "end": 2 * i + 1.5} for i in range(2)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, records)))
    clips = read_source(tmp_path / "c.jsonl").clips
    assert [clip.stretch for clip in clips] == [Stretch(0, 1.5), Stretch(2, 3.5)]


def test_a_folder_of_pictures_is_a_clip_beside_archives(tmp_path):
    for name, value in (("walk/one/f_2.png", 2), ("walk/one/f_10.png", 10), ("run/two/1.png", 1)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12), (value,) * 3).save(tmp_path / name)
    (tmp_path / "walk" / "one" / "notes.txt").touch()
    (tmp_path / "run" / "three.zip").touch()
    source = read_source(tmp_path)
    assert [(clip.name, clip.label) for clip in source.clips] == [
        ("run/three.zip", "run"),
        ("run/two", "run"),
        ("walk/one", "walk"),
    ]
    read = decode(tmp_path / "walk" / "one", FrameOptions(num_frames=2))
    assert read.pixels[:, 0, 0, 0].tolist() == [2, 10]
    with pytest.raises(DecodeError, match="no such file"):
        decode(tmp_path / "walk", FrameOptions())
