"""A pipe and a decoder that spins, in the training set of two processes: both are named, and the fit goes on."""

import csv
import os
import shutil

import pytest
import stuck_ranks as ranks
import torch
from stuck_clips import FAKE_DECORD

small_base, clip_folder = ranks.strategies.world.small_base, ranks.strategies.world.clip_folder

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pipe_and_a_spinning_decoder_cost_their_clips(small_base, clip_folder, tmp_path, monkeypatch, workers):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "decord.py").write_text(FAKE_DECORD)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'fake'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    clips, out = tmp_path / "clips", tmp_path / "out"
    shutil.copytree(clip_folder, clips)
    empty_box = b"\0\0\0\x08free"  # another content than that of 0.mp4, whose embeddings are known after its first read
    (clips / "spins.mp4").write_bytes((clips / "0.mp4").read_bytes() + empty_box)
    os.mkfifo(clips / "pipe.mp4")
    out.mkdir()
    status, said = ranks.strategies.processes.finish(ranks.__file__, small_base, clips, out, workers, limit_s=600)
    assert status == 0, said[-6000:]
    found = [torch.load(out / f"rank{rank}.pt") for rank in (0, 1)]
    assert found[0]["steps"] == found[1]["steps"] == 6  # six clips, two epochs, two clips a step
    for name, weight in found[0]["weights"].items():
        assert torch.equal(weight, found[1]["weights"][name])
        assert weight.isfinite().all()
    with (out / "sft_label_ddp" / "unreadable.csv").open() as file:
        assert {row["video_id"]: row["failed_reads"] for row in csv.DictReader(file)} == {
            "train_1": "2",
            "train_4": "2",
        }
    assert "pipe.mp4: not an ordinary file" in said
    assert "spins.mp4: still not read after 3 seconds" in said
