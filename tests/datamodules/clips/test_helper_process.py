"""Clips are read in a helper process, which a stuck file, a crash or a signal cannot take along."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from stuck_clips import FAKE_DECORD
from two_classes import make  # noqa: F401

from vidreason import signals
from vidreason.datamodules.clips import helper_process
from vidreason.datamodules.clips.dataset import ClipKey
from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.reading import read_frames
from vidreason.datamodules.clips.time_limit import ReadStoppedError
from vidreason.datamodules.prompts import LabelView


@pytest.fixture
def spinning(tmp_path, monkeypatch, write_clip):
    """A file at which decord spins."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "decord.py").write_text(FAKE_DECORD)
    monkeypatch.syspath_prepend(tmp_path / "fake")
    helper_process.close()
    yield write_clip(tmp_path / "spins.mp4", 3)
    helper_process.close()


def helper_pid():
    return helper_process.call(os.getpid, timeout=10)


def test_one_helper_serves_all_calls_and_errors_come_back(tmp_path, monkeypatch):
    first = helper_pid()
    assert first != os.getpid()
    assert helper_pid() == first
    with pytest.raises(FileNotFoundError, match="nothing"):
        helper_process.call(os.listdir, "nothing", timeout=10)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").touch()
    assert helper_process.call(os.listdir, timeout=10) == ["here"]
    assert helper_pid() == first
    there = threading.Thread(target=lambda: pids.append(helper_pid()))
    pids: list[int] = []
    there.start()
    there.join()
    assert pids != [first]


def test_a_call_that_takes_too_long_is_killed():
    pid = helper_pid()
    start = time.monotonic()
    with pytest.raises(helper_process.TimeLimitError, match="still not read after 0.5 seconds"):
        helper_process.call(time.sleep, 60, timeout=0.5)
    assert time.monotonic() - start < 5
    assert not Path(f"/proc/{pid}").exists()
    assert helper_pid() != pid


def test_a_crash_is_told():
    with pytest.raises(helper_process.HelperError, match=r"the decoder crashed \(SIGABRT\)"):
        helper_process.call(os.abort, timeout=10)


def test_a_signal_ends_a_call_where_signals_are_deferred(tmp_path):
    """A fit records a signal and stops between two batches, so that it must not wait for a read until then."""
    os.mkfifo(tmp_path / "pipe")
    with signals.handle_signals():
        signals.defer_signals(True)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        start = time.monotonic()
        with pytest.raises(helper_process.StoppedError):
            helper_process.call(Path.read_bytes, tmp_path / "pipe", timeout=60)
        with pytest.raises(ReadStoppedError, match="the run was stopped"):
            read_frames(tmp_path / "pipe", FrameOptions())
        assert time.monotonic() - start < 5
    assert helper_pid(), "the next run of this process is not stopped"


ABANDONED = """
import os, sys, time
from vidreason.datamodules.clips import helper_process
print(helper_process.call(os.getpid, timeout=30), flush=True)
helper_process.call(time.sleep, 60, timeout=60)
"""


def test_no_helper_outlives_its_process(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", ABANDONED], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    pid = int(run.stdout.readline())
    run.kill()
    run.wait()
    until = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_a_spinning_decoder_costs_its_clip_only(spinning, write_clip, tmp_path):
    options = FrameOptions(num_frames=2, timeout=1.5)
    with pytest.raises(DecodeError, match=r"spins\.mp4: still not read after 1.5 seconds"):
        read_frames(spinning, options)
    assert read_frames(write_clip(tmp_path / "fine.mp4", 3), options).reader == "pyav"


def test_a_file_that_took_too_long_twice_is_not_tried_again(spinning, make):  # noqa: F811
    data = make(frames=FrameOptions(num_frames=2, timeout=0.5))
    (data.folder / "1.mp4").unlink()
    (data.folder / "1.mp4").symlink_to(spinning)
    dataset = data.loader("train", LabelView(data.task), train=True).dataset
    errors = [dataset[ClipKey(1, 0)].failed.error.partition(": ")[2] for _ in range(3)]
    assert errors == ["still not read after 0.5 seconds"] * 2 + ["not read within 0.5 seconds, twice"]
    assert dataset[ClipKey(2, 0)].failed is None


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    start = time.monotonic()
    with pytest.raises(DecodeError, match="not an ordinary file"):
        read_frames(tmp_path / "pipe.mp4", FrameOptions())
    assert time.monotonic() - start < 5
