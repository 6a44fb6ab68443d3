"""Decoded frames are kept on disk: once for each content and choice of frames, whatever happens to the folder."""

import errno
import multiprocessing
import os
import time
import warnings

import pytest
import torch

from vidreason.datamodules.clips import frame_cache, reading
from vidreason.datamodules.clips.decoded import DecodedVideo, DecodeError
from vidreason.datamodules.clips.decoding import FrameOptions, decode
from vidreason.datamodules.clips.reading import read_frames
from vidreason.datamodules.clips.sampling import Stretch
from vidreason.datamodules.types import FrameTiming

FORK = multiprocessing.get_context("fork")  # a new interpreter takes seconds to import torch


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that were decoded, in order."""
    names = []

    def counted(path, *args):
        names.append(path.name)
        return decode(path, *args)

    monkeypatch.setattr(reading, "decode", counted)
    return names


@pytest.fixture
def options(tmp_path):
    """Builds options with a cache in the folder ``cache``; clips are read in this process."""
    return lambda **given: FrameOptions(**{"num_frames": 4, "timeout": None, "cache": str(tmp_path / "cache")} | given)


def entries(tmp_path):
    return sorted((tmp_path / "cache").glob("*.frames"))


@pytest.mark.parametrize("cache_format", ["raw", "jpeg"])
def test_a_clip_is_decoded_once_and_its_frames_stay_the_same(write_clip, tmp_path, decoded, options, cache_format):
    path = write_clip(tmp_path / "clip.mp4", 24, size=(90, 64))
    plain = read_frames(path, FrameOptions(num_frames=4, timeout=None))
    decoded.clear()
    first, second = (read_frames(path, options(cache_format=cache_format)) for _ in range(2))
    assert decoded == ["clip.mp4"]
    assert torch.equal(first.frames, second.frames)
    assert (second.timing, second.frames_in_file, second.reader) == (plain.timing, 24, plain.reader)
    if cache_format == "raw":
        assert torch.equal(second.frames, plain.frames)
    else:  # the pattern's stripes differ by 200 grey levels
        assert 0 < (second.frames.float() - plain.frames.float()).abs().max() < 25
        uncached = read_frames(path, options(cache_format="jpeg", cache=None))
        assert torch.equal(uncached.frames, second.frames)
        assert entries(tmp_path)[0].stat().st_size < plain.frames.nbytes / 4
    second.frames.zero_()  # what a caller does to its frames stays with it
    assert torch.equal(read_frames(path, options(cache_format=cache_format)).frames, first.frames)


def test_content_and_choice_of_frames_name_an_entry(write_clip, tmp_path, decoded, options):
    path = write_clip(tmp_path / "clip.mp4", 24)
    read_frames(path, options())
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(path.read_bytes())
    read_frames(copy, options())
    assert decoded == ["clip.mp4"]
    for other in ({"num_frames": 3}, {"max_pixels": 600}, {"sampling": "fps", "fps": 2.0}, {"reader": "pyav"}):
        read_frames(path, options(**other))
    read_frames(path, options(), stretch=Stretch(0.5, 1.5))
    assert len(decoded) == 6
    write_clip(path, 12)
    os.utime(path, ns=(copy.stat().st_mtime_ns,) * 2)
    assert read_frames(path, options()).frames_in_file == 12
    assert len(decoded) == 7


def test_jittered_and_damaged_clips_are_decoded_each_time(write_clip, tmp_path, decoded, options):
    path = write_clip(tmp_path / "clip.mp4", 24)
    jitter = torch.Generator().manual_seed(0)
    frames = [read_frames(path, options(sampling="segment"), jitter).timing.indices for _ in range(8)]
    assert len(set(frames)) > 1
    damaged = write_clip(tmp_path / "damaged.mp4", 60, gop=10)
    content = bytearray(damaged.read_bytes())
    middle = len(content) // 2
    content[middle - 400 : middle] = bytes(400)
    damaged.write_bytes(content)
    assert [read_frames(damaged, options()).partial for _ in range(2)] == [True, True]
    assert entries(tmp_path) == []


def damage(kind, path):
    content = bytearray(path.read_bytes())
    if kind == "cut":
        content = content[: len(content) // 2]
    elif kind == "longer":
        content += b"\0"
    elif kind == "empty":
        content = b""
    else:
        content[{"checksum": 3, "header": 60, "frames": -100}[kind]] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("cache_format", ["raw", "jpeg"])
def test_a_damaged_entry_is_named_and_remade(write_clip, tmp_path, decoded, options, cache_format):
    path = write_clip(tmp_path / "clip.mp4", 24)
    given = options(cache_format=cache_format)
    first = read_frames(path, given)
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    for kind in ("cut", "longer", "empty", "checksum", "header", "frames"):
        damage(kind, entry)
        with pytest.warns(UserWarning, match=rf"{entry.name}: damaged, the clip is decoded again"):
            again = read_frames(path, given)
        assert torch.equal(again.frames, first.frames)
        assert entry.read_bytes() == whole
    assert len(decoded) == 7
    read_frames(write_clip(tmp_path / "other.mp4", 12), given)
    (other,) = set(entries(tmp_path)) - {entry}
    entry.write_bytes(other.read_bytes())
    with pytest.warns(UserWarning, match="another entry's content"):
        assert read_frames(path, given).frames_in_file == 24


def test_a_full_folder_keeps_what_is_in_use_and_says_so_once(write_clip, tmp_path, decoded, options):
    paths = [write_clip(tmp_path / f"{i}.mp4", 12 + i) for i in range(4)]
    size = 4 * 3 * 96 * 64 + 1000
    given = options(cache_gb=2 * size / 1e9)
    for path in paths[:2]:
        read_frames(path, given)
    with pytest.warns(UserWarning, match="no more frames are stored, it has .* raise frames.cache_gb"):
        read_frames(paths[2], given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_frames(paths[3], given)
    decoded.clear()
    for path in paths:
        read_frames(path, given)
    assert decoded == ["2.mp4", "3.mp4"]

    frame_cache.frame_cache.cache_clear()  # as another process, a day later
    for entry in entries(tmp_path):
        os.utime(entry, (time.time() - 90_000,) * 2)
    read_frames(paths[0], given)
    read_frames(paths[3], given)
    assert sum(entry.stat().st_size for entry in entries(tmp_path)) <= 2 * size
    decoded.clear()
    read_frames(paths[0], given)
    read_frames(paths[3], given)
    assert decoded == []


def test_a_full_disk_costs_nothing_but_the_cache(write_clip, tmp_path, decoded, options, monkeypatch):
    def full(path, parts):
        path.write_bytes(parts[0])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(frame_cache, "_write_all", full)
    path = write_clip(tmp_path / "clip.mp4", 12)
    with pytest.warns(UserWarning, match=r"No space left on device: '.*\.frames': free some space"):
        read_frames(path, options())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_frames(path, options()).frames_in_file == 12
    assert [file.name for file in (tmp_path / "cache").iterdir()] == []


def test_an_unchanged_file_is_hashed_once(write_clip, tmp_path, decoded, options, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", 12)
    read_frames(path, options())
    monkeypatch.setattr(reading, "content_sha", None)
    assert read_frames(path, options()).frames_in_file == 12


def test_what_is_no_file_is_named_as_without_a_cache(tmp_path, options):
    os.mkfifo(tmp_path / "pipe.mp4")
    for name, reason in (("pipe.mp4", "not an ordinary file"), ("none.mp4", "no such file")):
        with pytest.raises(DecodeError, match=reason):
            read_frames(tmp_path / name, options())


def numbered(i):
    return DecodedVideo(
        torch.full((8, 3, 180, 320), i % 251, dtype=torch.uint8), FrameTiming(10.0, 8, (0,) * 8), 8, "x"
    )


def write_entries(folder, first, encoded):
    cache = frame_cache.FrameCache(folder, 1.0)
    for i in range(first, first + 10_000):
        cache.write(f"{i:040x}", numbered(i), encoded)


@pytest.mark.parametrize("jpeg", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_processes_leave_whole_entries_only(tmp_path, jpeg):
    folder = tmp_path / "cache"
    encoded = frame_cache.as_jpeg(numbered(7).frames) if jpeg else None
    for attempt in range(6):
        writer = FORK.Process(target=write_entries, args=(folder, 10_000 * attempt, encoded))
        writer.start()
        before = time.monotonic()
        while not any(folder.glob(f"*{10_000 * attempt:x}.frames")) and time.monotonic() < before + 60:
            time.sleep(0.001)
        time.sleep(0.006 * attempt)
        writer.kill()
        writer.join()
    cache = frame_cache.FrameCache(folder, 1.0)
    assert len(entries(tmp_path)) > 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for entry in entries(tmp_path):
            frames = cache.read(entry.stem).frames
            assert torch.equal(frames, numbered(7 if jpeg else int(entry.stem, 16)).frames)
    for draft in folder.glob(".*.part"):
        os.utime(draft, (0, 0))
    assert cache.folder.bytes == sum(entry.stat().st_size for entry in entries(tmp_path))
    assert list(folder.glob(".*")) == []


def read_all(paths, given):
    warnings.simplefilter("error")
    for path in paths:
        read_frames(path, given)


def test_two_runs_fill_one_cache(write_clip, tmp_path, decoded, options):
    paths = [write_clip(tmp_path / f"{i}.mp4", 12 + i) for i in range(12)]
    given = options(reader="pyav")
    runs = [FORK.Process(target=read_all, args=(order, given)) for order in (paths, paths, paths[::-1])]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert len(entries(tmp_path)) == 12
    assert list((tmp_path / "cache").glob(".*")) == []
    cached = [read_frames(path, given).frames for path in paths]
    assert decoded == []
    uncached = [read_frames(path, options(reader="pyav", cache=None)).frames for path in paths]
    assert all(torch.equal(*pair) for pair in zip(cached, uncached, strict=True))
