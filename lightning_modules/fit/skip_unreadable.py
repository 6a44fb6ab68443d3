"""Trains without clips that cannot be read, reports them, and stops the fit if there are too many.

An unreadable clip becomes a placeholder video without weight in the loss (``VideoBatch.sample_mask``), so that every
rank runs the same forward passes. The fit stops when more than a given share of the training clips is unreadable, for
example because a disk was unmounted.
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
    """Raised on all ranks if more training clips are unreadable than ``max_fraction`` allows."""


class SkipUnreadable(L.Callback):
    """Counts the unreadable training clips of all ranks, and stops the fit if there are too many.

    The stage must set ``supports_masked_samples``, which declares that its loss leaves out what
    ``VideoBatch.sample_mask`` excludes; otherwise the first unreadable clip ends the fit.

    Args:
        max_fraction: Largest share of the training clips that may be unreadable.
    """

    def __init__(self, max_fraction: float = 0.5) -> None:
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"SkipUnreadable.max_fraction must be between 0 and 1, got {max_fraction}")
        self.max_fraction = max_fraction
        self._reads: Counter[str] = Counter()
        """Number of failed reads by video id, over all ranks and finished batches."""
        self._in_this_batch: tuple[str, ...] = ()
        self._step_has_samples = True

    def state_dict(self) -> dict[str, Any]:
        """Returns the numbers of failed reads."""
        return {"reads": dict(self._reads)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the numbers of failed reads of an interrupted fit."""
        self._reads = Counter(state_dict["reads"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Resets the counts of an earlier fit of this process; Lightning restores a checkpoint after this hook."""
        self._reads.clear()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Warns about the unreadable clips of the batch and checks their number.

        Raises:
            TooManyUnreadableError: On all ranks, if more clips are unreadable than ``max_fraction`` allows.
            DecodeError: On all ranks, if a clip is unreadable and the stage does not support masked samples.
        """
        if not isinstance(batch, VideoBatch):
            return
        warn_unreadable(batch, "no weight in this step")
        strategy = trainer.strategy
        counts = torch.tensor([int(batch.sample_mask.sum()), len(batch.failed)], dtype=torch.float32)
        # Every rank takes part, also one without an unreadable clip, so that all decide the same.
        valid, failed = strategy.reduce(counts.to(strategy.root_device), reduce_op="sum").tolist()
        # In automatic optimisation, a step may accumulate the gradients of several batches.
        begins_step = batch_idx % trainer.accumulate_grad_batches == 0
        self._step_has_samples = bool(valid) or (self._step_has_samples and not begins_step)
        self._in_this_batch = ()
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
        """Drops the gradients of a step without samples in automatic optimisation, so that weights do not change.

        With a gradient scaler, which fails without gradients, they stay.
        """
        if not self._step_has_samples and getattr(trainer.precision_plugin, "scaler", None) is None:
            optimizer.zero_grad(set_to_none=True)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Counts the failed reads of the finished batch; a resumed fit repeats an interrupted batch."""
        self._reads.update(self._in_this_batch)
        self._in_this_batch = ()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes ``unreadable.csv`` and warns about the number of unreadable clips."""
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
