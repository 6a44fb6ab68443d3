"""Training clips that cannot be read: a fit goes on without them, says so, and ends where nothing can be read at all.

In its batch such a clip is a black video without weight (``clips/collating.py``), so that every rank runs its
part of the step. A disk that has gone away ends the fit: nobody wants a night of steps on nothing.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from vidreason.datamodules.atomic_files import whole_file
from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.datamodules.splits import first_five
from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_modules.own_traces import report_failed
from vidreason.lightning_modules.resumable import ResumableModule
from vidreason.run_folder import UNREADABLE_FILE

_NAMED = 3
"""Reasons that are given where nothing can be read"""
_BY_CHANCE = 16
"""Clips in a row that may be damaged by chance; where batches are larger, those of one"""
_GONE = "mend them, or the disk they lie on, and resume; or let vidreason init set them aside, and start again"
_UNWEIGHED = "mend or remove them, or let the stage weigh clips (weighs_clips in docs/extending.md)"
"""In the run folder: the training clips that the fit went without, and how often"""


class NothingReadError(DecodeError):
    """So many clips in a row cannot be read, on any rank, that it is no chance; all ranks raise it together."""


class UnreadClipsModule(ResumableModule):
    """A stage that is trained without the clips that cannot be read."""

    weighs_clips: ClassVar[bool] = False
    """True where ``training_step`` learns nothing from clips that ``sample_mask`` leaves out; else the fit ends"""

    def __init__(self) -> None:
        super().__init__()
        self.learns_nothing = False
        """No clip of the optimizer step that comes has weight, on any rank: the weights stay as they are"""
        self._unread: Counter[str] = Counter()
        self._unread_now: Counter[str] = Counter()
        self._lost_in_a_row = 0

    # ------------------------------------------------------------------ checkpoints

    def rank_state(self) -> dict[str, Any]:
        """The clips that this rank could not read, with the number of their turns."""
        return {**super().rank_state(), "unread": dict(self._unread), "lost_in_a_row": self._lost_in_a_row}

    def unread_before_this_batch(self) -> dict[str, int]:
        """The same for a batch that is begun again after a restart."""
        return dict(self._unread - self._unread_now)

    def take_rank_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Lets the first rank count on what all had counted."""
        super().take_rank_states(states)
        self._lost_in_a_row = states[0].get("lost_in_a_row", 0)
        for state in states if self.global_rank == 0 else ():
            self._unread.update(state.get("unread", {}))

    # ------------------------------------------------------------------ training

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Names the clips that could not be read; the ranks add up, in one exchange, how many could.

        Raises:
            NothingReadError: On all ranks, where none of many in a row could.
            DecodeError: On all ranks, where one could not, and the stage has not said that it weighs clips.
        """
        super().on_train_batch_start(batch, batch_idx)
        if not isinstance(batch, VideoBatch):
            return
        report_failed(batch, "no weight in this step")
        strategy = self.trainer.strategy
        numbers = [int(batch.sample_mask.sum()), len(batch.failed)]
        weighed, lost = strategy.reduce(
            torch.tensor(numbers, dtype=torch.float32, device=strategy.root_device), reduce_op="sum"
        ).tolist()
        if lost and not self.weighs_clips:
            raise DecodeError(self._unreadable(batch, _UNWEIGHED))
        self.learns_nothing = not weighed
        self._lost_in_a_row = 0 if weighed else self._lost_in_a_row + int(lost)
        if self._lost_in_a_row and self._lost_in_a_row >= self._most_by_chance():
            raise NothingReadError(f"{self._lost_in_a_row} in a row: {self._unreadable(batch, _GONE)}")
        self._unread_now = Counter(failed.clip.video_id for failed in batch.failed)
        self._unread.update(self._unread_now)

    def _most_by_chance(self) -> int:
        clips = len(self.trainer.train_dataloader.dataset)  # type: ignore[union-attr]
        return min(max(_BY_CHANCE, self.clips_per_batch()), clips)

    def _unreadable(self, batch: VideoBatch, remedy: str) -> str:
        """What the first rank says; all of them call it."""
        reasons = [reason for own in self.all_ranks([failed.error for failed in batch.failed]) for reason in own]
        if self.global_rank > 0:
            return "training clips cannot be read"
        shown = "; ".join(reasons[:_NAMED])
        more = f"; and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
        return f"training clips cannot be read: {shown}{more}: {remedy}"

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Takes the gradients away from a step on nothing, or momentum and weight decay would move the weights."""
        if self.learns_nothing and getattr(self.trainer.precision_plugin, "scaler", None) is None:  # it wants gradients
            optimizer.zero_grad(set_to_none=True)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """As in Lightning, but for what a step on nothing would say of training."""
        if not (self.learns_nothing and name.startswith("train/")):
            super().log(name, value, *args, **kwargs)

    def on_train_end(self) -> None:
        """Says, and writes into the run folder, once for all ranks, which clips the fit went without."""
        unread: Counter[str] = sum(map(Counter, self.all_ranks(dict(self._unread))), Counter())
        if self.global_rank == 0:
            _write(self.run_dir / UNREADABLE_FILE, unread)
        if unread:
            rank_zero_warn(
                f"{self.stage_name}: {len(unread)} training clip{'s'[: len(unread) > 1]} could not be read and had no "
                f"weight (failed reads: {unread.total()}; {UNREADABLE_FILE}): {first_five(sorted(unread))}"
            )
        self._unread.clear()


def _write(path: Path, unread: Mapping[str, int]) -> None:
    if not unread:
        path.unlink(missing_ok=True)
        return
    with whole_file(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("video_id", "times"), *sorted(unread.items())])
