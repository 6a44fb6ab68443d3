"""Trains without the clips that cannot be read, reports them, and stops where too many cannot.

In its batch an unreadable clip is a placeholder video that has no weight (``VideoBatch.sample_mask``), so that every
rank runs the same forward passes. A disk that has gone away must not cost a night of steps on nothing: the fit stops
when a given share of the training clips turned out to be unreadable.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from vidreason.datamodules.atomic_files import atomic_file
from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.datamodules.splits import first_five
from vidreason.datamodules.types import FailedClip, VideoBatch
from vidreason.datamodules.unreadable import warn_unreadable
from vidreason.lightning_modules.fit.ranks import gather_objects
from vidreason.run_folder import UNREADABLE_FILE

_SHOWN_REASONS = 3


class TooManyUnreadableError(DecodeError):
    """More training clips cannot be read than ``max_fraction`` allows; all ranks raise it together."""


class SkipUnreadable(L.Callback):
    """Counts the training clips that cannot be read, over all ranks, and stops the fit where they are too many.

    A stage says with ``supports_masked_samples`` that its loss leaves out what ``VideoBatch.sample_mask`` excludes;
    otherwise the first unreadable clip ends the fit.

    Args:
        max_fraction: Largest share of the training clips that may be unreadable.
    """

    def __init__(self, max_fraction: float = 0.5) -> None:
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"SkipUnreadable.max_fraction must be between 0 and 1, got {max_fraction}")
        self.max_fraction = max_fraction
        self._reads: Counter[str] = Counter()
        """Failed reads by video id, of all ranks and finished batches."""
        self._in_this_batch: tuple[str, ...] = ()
        self._step_has_samples = True

    def state_dict(self) -> dict[str, Any]:
        """Returns the failed reads so far."""
        return {"reads": dict(self._reads)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the counts of the interrupted fit."""
        self._reads = Counter(state_dict["reads"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forgets an earlier fit of this process; a checkpoint is restored after this hook."""
        self._reads.clear()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Names the clips of the batch that could not be read.

        Raises:
            TooManyUnreadableError: On all ranks, where more clips are unreadable than ``max_fraction`` allows.
            DecodeError: On all ranks, where a clip is unreadable and the stage does not support masked samples.
        """
        if not isinstance(batch, VideoBatch):
            return
        warn_unreadable(batch, "no weight in this step")
        strategy = trainer.strategy
        counts = torch.tensor([int(batch.sample_mask.sum()), len(batch.failed)], dtype=torch.float32)
        valid, failed = strategy.reduce(counts.to(strategy.root_device), reduce_op="sum").tolist()
        self._step_has_samples, self._in_this_batch = bool(valid), ()
        if not failed:
            return
        everywhere: list[FailedClip] = [clip for own in gather_objects(list(batch.failed)) for clip in own]
        if not getattr(pl_module, "supports_masked_samples", False):
            remedy = "repair or remove them, or let the stage support masked samples (docs/extending.md)"
            raise DecodeError(f"training clips cannot be read: {_reasons(everywhere)}: {remedy}")
        self._in_this_batch = tuple(clip.clip.video_id for clip in everywhere)
        unreadable = len({*self._reads, *self._in_this_batch})
        clips = len(trainer.train_dataloader.dataset)  # type: ignore[union-attr]
        if unreadable > self.max_fraction * clips:
            raise TooManyUnreadableError(
                f"{unreadable} of {clips} training clips cannot be read: {_reasons(everywhere)}: repair them (or the "
                "disk) and resume, or let vidreason init leave them out and start again"
            )

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Drops the gradient of an automatically optimised step without samples: weight decay would move the weights.

        A gradient scaler needs gradients, so it keeps them.
        """
        if not self._step_has_samples and getattr(trainer.precision_plugin, "scaler", None) is None:
            optimizer.zero_grad(set_to_none=True)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Counts the failed reads of the batch; those of an interrupted batch are read again on resume."""
        self._reads.update(self._in_this_batch)
        self._in_this_batch = ()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes ``unreadable.csv`` and says how many clips the fit went without."""
        if trainer.is_global_zero:
            _write(Path(trainer.default_root_dir) / UNREADABLE_FILE, self._reads)
        if self._reads:
            number = len(self._reads)
            rank_zero_warn(
                f"{number} training clip{'s'[: number > 1]} could not be read and had no weight (failed reads: "
                f"{self._reads.total()}; {UNREADABLE_FILE}): {first_five(sorted(self._reads))}"
            )


def _reasons(clips: list[FailedClip]) -> str:
    shown = "; ".join(clip.error for clip in clips[:_SHOWN_REASONS])
    return shown + (f"; and {len(clips) - _SHOWN_REASONS} more" if len(clips) > _SHOWN_REASONS else "")


def _write(path: Path, reads: Mapping[str, int]) -> None:
    if not reads:
        path.unlink(missing_ok=True)
        return
    with atomic_file(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("video_id", "failed_reads"), *sorted(reads.items())])
