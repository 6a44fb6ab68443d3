"""``vidreason data cache``: the frames of a fit are decoded beforehand, and the fit finds them."""

import pytest
from two_classes import make  # noqa: F401

from vidreason.cli.main import main
from vidreason.datamodules.clips import reading
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.reading import read_frames
from vidreason.prepare.caching import fill_cache


def test_all_clips_are_decoded_once(make, tmp_path, monkeypatch):  # noqa: F811
    """Three files are listed nineteen times; one of them is no video."""
    (tmp_path / "2.mp4").write_text("no video")
    data = make(frames=FrameOptions(num_frames=4, cache=str(tmp_path / "cache")))
    first, *lines = fill_cache(data, 2).lines()
    assert first.startswith(f"{tmp_path}/cache: 3 clips, 2 decoded now, 0 found there, 1 unreadable; ")
    assert first.endswith("of at most 50 GB")
    assert [line.partition(" PyAV")[0] for line in lines] == [f"  unreadable: {tmp_path}/2.mp4:"]
    assert "0 decoded now, 2 found there, 1 unreadable" in fill_cache(data, 2).lines()[0]
    monkeypatch.setattr(reading, "decode", None)
    assert read_frames(tmp_path / "1.mp4", data.frames).frames.shape == (4, 3, 32, 48)


def test_what_is_not_stored_is_told(make, tmp_path):  # noqa: F811
    cache = str(tmp_path / "cache")
    data = make({"train": 2, "val": 1}, frames=FrameOptions(num_frames=4, sampling="segment", cache=cache))
    first, last = fill_cache(data, 1).lines()
    assert "1 clips, 1 decoded now" in first
    assert last.startswith("  left out is the split train")
    with pytest.warns(UserWarning, match="raise frames.cache_gb"):
        report = fill_cache(make(frames=FrameOptions(num_frames=4, cache=cache, cache_gb=1e-5)), 1)
    assert report.stopped
    assert "0 decoded now, 0 found there, 3 not stored" in report.lines()[0]
    with pytest.raises(ValueError, match=r"frames.cache is null: give --data.init_args.frames.cache FOLDER"):
        fill_cache(make(), 1)


@pytest.mark.slow
def test_the_command_takes_the_options_of_a_fit(tmp_path, write_clip, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = ["path,label,split"]
    for i, split in enumerate(("train", "train", "val", "cal", "test")):
        write_clip(tmp_path / f"{i}.mp4", 12 + i)
        lines.append(f"{i}.mp4,{'ab'[i % 2]},{split}")
    (tmp_path / "m.csv").write_text("\n".join(lines))
    section = "class_path: vidreason.datamodules.manifest.ManifestDataModule\ninit_args: {manifest: m.csv}\n"
    (tmp_path / "data.yaml").write_text(section)
    command = ["data", "cache", "--config", "configs/sft_label.yaml", "--data", "data.yaml", "--workers", "2"]
    assert main(command) == 2
    assert "frames.cache is null" in capsys.readouterr().err
    frames = {"num_frames": 4, "max_pixels": 1500}
    options = [f"--data.init_args.frames.{key}={value}" for key, value in {**frames, "cache": "cache"}.items()]
    assert main([*command, *options]) == 0
    assert "cache: 5 clips, 5 decoded now, 0 found there; " in capsys.readouterr().out
    monkeypatch.setattr(reading, "decode", None)
    assert read_frames(tmp_path / "4.mp4", FrameOptions(**frames, cache="cache")).frames.shape[0] == 4
