"""Two gloo ranks whose training set has a pipe and a file at which the decoder spins.

    python tests/support/stuck_ranks.py BASE CLIPS OUT WORKERS PORT

writes ``OUT/rank0.pt`` and ``OUT/rank1.pt``. BASE and CLIPS are those of ``stage_world``; CLIPS has ``pipe.mp4`` and
``spins.mp4`` besides.
"""

from __future__ import annotations

import functools
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import strategy_ranks as strategies
import torch

from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.types import Clip

STUCK = {"train_1": "pipe.mp4", "train_4": "spins.mp4"}
"""One is the first rank's in the first epoch, and the other the second's."""
TIMEOUT = 3.0


class StuckClips(strategies.world.GreyClips):  # type: ignore[misc, name-defined]
    """Two of the six training clips cannot be read."""

    def samples(self, split: str) -> Sequence[Clip]:
        clips: Sequence[Clip] = super().samples(split)
        return [
            replace(clip, path=self.folder / STUCK[clip.video_id]) if clip.video_id in STUCK else clip for clip in clips
        ]


def _rank(rank: int, base: Path, clips: Path, out: Path, workers: int) -> None:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it has workers
    data = functools.partial(StuckClips, frames=FrameOptions(num_frames=4, timeout=TIMEOUT), num_workers=workers)
    start = time.monotonic()
    found = strategies.run("sft_label", "ddp", base, clips, out, 2, clips_of=data, batch_size=2, test=False)
    torch.save({**found, "seconds": time.monotonic() - start}, out / f"rank{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    strategies.processes.fork_two(_rank, (*map(Path, sys.argv[1:4]), int(sys.argv[4])), port=sys.argv[5])
