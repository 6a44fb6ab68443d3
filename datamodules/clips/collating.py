"""Collation of clips into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from vidreason.datamodules.clips.dataset import LoadedClip
from vidreason.datamodules.clips.placeholder_video import blackened
from vidreason.datamodules.types import BatchEncoder, Example, VideoBatch


class BatchCollator:
    """Encodes the clips of a batch and lists those that could not be read.

    Args:
        encoder: The model family's.
        label_names: Index of a label is its place here.
    """

    def __init__(self, encoder: BatchEncoder, label_names: Sequence[str]) -> None:
        self.encoder = encoder
        self.label_index = {name: index for index, name in enumerate(label_names)}

    def __call__(self, items: Sequence[LoadedClip]) -> VideoBatch:
        """Collates a batch; ``encoded`` is None if there is no clip to encode."""
        shown = [item for item in items if item.content is not None]
        examples = _alike(shown)
        labels = [-1 if e.sample.label is None else self.label_index[e.sample.label] for e in examples]
        return VideoBatch(
            encoded=self.encoder.encode(examples) if examples else None,
            labels=torch.tensor(labels, dtype=torch.int64),
            sample_mask=torch.tensor([item.failed is None and item.valid for item in shown], dtype=torch.bool),
            clips=tuple(example.sample.clip for example in examples),
            failed=tuple(item.failed for item in items if item.failed is not None and item.valid),
            decode_ms=sum(item.decode_ms for item in items) / max(len(items), 1),
        )


def _alike(items: Sequence[LoadedClip]) -> list[Example]:
    """Returns the examples of a batch; placeholder videos get the shape of the first clip that could be read.

    An encoder that accepts the other clips then accepts them as well.
    """
    examples = [item.content for item in items if item.content is not None]
    read = next((e.sample for e, item in zip(examples, items, strict=True) if item.failed is None), None)
    return [
        e if item.failed is None else replace(e, sample=blackened(e.sample, read))
        for e, item in zip(examples, items, strict=True)
    ]
