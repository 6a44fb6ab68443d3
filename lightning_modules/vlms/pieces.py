"""Batches of clips in pieces, so that the memory of a forward does not grow with the batch.

Shape letters: B clips, N texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vidreason.datamodules.types import Encoded, VideoBatch
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.completions import take_prompts


@dataclass(frozen=True)
class EvalOptions:
    """Options of forwards without a backward pass: validation, test, label scoring and written texts.

    Args:
        clips_per_forward: Clips that go through the model at once, with all their texts or samples; null is the whole
            batch that ``data.init_args.eval_batch_size`` loads. It limits memory and changes no result beyond rounding.
    """

    clips_per_forward: int | None = None

    def __post_init__(self) -> None:
        if self.clips_per_forward is not None and self.clips_per_forward < 1:
            raise ValueError(f"eval.clips_per_forward must be at least 1 or null, got {self.clips_per_forward}")


def split_clips(vlm: VLM, batch: VideoBatch, clips_per_forward: int | None) -> list[VideoBatch]:
    """Splits a batch into pieces of at most ``clips_per_forward`` clips with their texts; ``failed`` is left out."""
    size = clips_per_forward or len(batch)
    if size >= len(batch):
        return [batch]
    parts = []
    for start in range(0, len(batch), size):
        stop = min(start + size, len(batch))
        index = torch.arange(start, stop, device=batch.labels.device)
        encoded = Encoded(take_prompts(vlm, batch.prompts, index), batch.texts.behind(start, stop))
        parts.append(VideoBatch(encoded, batch.labels[index], batch.sample_mask[index], batch.clips[start:stop]))
    return parts
