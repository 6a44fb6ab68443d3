"""A data set of one's own, and an encoder from whose prompts and texts a test can read what it was given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.types import Clip, Encoded, EncodedPrompts, Example, TextBatch


class FakeEncoder:
    """Prompts are the mean grey of each frame, texts their characters."""

    def encode(self, examples: Sequence[Example]) -> Encoded:
        frames = torch.stack([e.sample.frames.float().mean((1, 2, 3)) for e in examples])
        indices = torch.tensor([e.sample.timing.indices for e in examples])
        texts = [(owner, text) for owner, e in enumerate(examples) for text in e.texts]
        length = max((len(text.text) for _, text in texts), default=0)
        ids = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, (_, text) in enumerate(texts):
            ids[row, : len(text.text)] = torch.tensor([ord(c) for c in text.text])
        owner = torch.tensor([o for o, _ in texts], dtype=torch.int64)
        parent = torch.tensor([text.parent for _, text in texts], dtype=torch.int64)
        batch = TextBatch(ids, ids > 0, ids > 0, torch.zeros_like(ids, dtype=torch.bool), owner, parent)
        inputs = {"frames": frames, "indices": indices}
        return Encoded(EncodedPrompts(inputs, len(examples), torch.zeros(0, dtype=torch.int64)), batch)


class TwoClasses(VideoDataModule):
    """All that a data set of one's own has to write."""

    folder: Path
    counts = {"train": 10, "val": 2, "cal": 2, "test": 3, "test_night": 2}

    @property
    def label_names(self):
        return ("a", "b")

    def splits(self):
        return tuple(self.counts)

    def samples(self, split):
        return [
            Clip(self.folder / f"{i % 3}.mp4", "ab"[i % 2], f"{split}{i}", group=f"{split}{i // 2}")
            for i in range(self.counts.get(split, 0))
        ]


@pytest.fixture
def make(write_clip, tmp_path):
    for i in range(3):
        write_clip(tmp_path / f"{i}.mp4", frames=24 + 12 * i, size=(48, 32))

    def build(counts=None, **options) -> TwoClasses:
        data = TwoClasses(FakeEncoder(), **{"frames": FrameOptions(num_frames=4), "batch_size": 4} | options)
        data.folder = tmp_path
        data.counts = counts or data.counts
        return data

    return build


def epoch(loader, number: int = 0):
    loader.sampler.set_epoch(number)
    return list(loader)


def order(batches):
    return [video_id for batch in batches for video_id in batch.video_ids]
