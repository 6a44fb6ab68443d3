"""Training clips that cannot be read: a fit goes on without them, says so, and ends where nothing can be read at all.

In its batch such a clip is a black video without weight (``datamodules/collating.py``), so that every rank runs its
part of the step. A disk that has gone away ends the fit: nobody wants a night of steps on nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from vidreason.datamodules.decoded import DecodeError
from vidreason.datamodules.splits import first_five
from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_modules.own_traces import report_failed
from vidreason.lightning_modules.resumable import ResumableModule

_NAMED = 3
"""Reasons that are given where nothing can be read"""


class NothingReadError(DecodeError):
    """No clip of a batch can be read, on any rank; all of them raise it, before anything of the batch is trained on."""


class UnreadClipsModule(ResumableModule):
    """A stage that is trained without the clips that cannot be read."""

    def __init__(self) -> None:
        super().__init__()
        self._unread: Counter[str] = Counter()
        self._lost_in_a_row = 0

    def rank_state(self) -> dict[str, Any]:
        """The clips that this rank could not read, with the number of their turns."""
        return {**super().rank_state(), "unread": dict(self._unread)}

    def take_rank_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Lets the first rank count on what all had counted."""
        super().take_rank_states(states)
        for state in states if self.global_rank == 0 else ():
            self._unread.update(state.get("unread", {}))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Names the clips that could not be read; the ranks add up, in one exchange, how many could.

        Raises:
            NothingReadError: On all ranks, where none could, of a whole batch in a row.
        """
        super().on_train_batch_start(batch, batch_idx)
        if not isinstance(batch, VideoBatch):
            return
        report_failed(batch, "no weight in this step")
        strategy = self.trainer.strategy
        numbers = [len(batch) - len(batch.fillers), len(batch.failed)]
        weighed, lost = strategy.reduce(
            torch.tensor(numbers, dtype=torch.float32, device=strategy.root_device), reduce_op="sum"
        ).tolist()
        self._lost_in_a_row = 0 if weighed else self._lost_in_a_row + int(lost)
        if self._lost_in_a_row and self._lost_in_a_row >= self._most_at_once():
            self._refuse(batch)
        self._unread.update(failed.clip.video_id for failed in batch.failed)

    def _most_at_once(self) -> int:
        """Clips of a whole batch, at least two: a single one, or a shorter last batch, may be damaged by chance."""
        clips = len(self.trainer.train_dataloader.dataset)  # type: ignore[union-attr]
        return max(2, min(self.clips_per_batch(), clips))

    def _refuse(self, batch: VideoBatch) -> None:
        reasons = [reason for own in self.all_ranks([failed.error for failed in batch.failed]) for reason in own]
        shown = "; ".join(reasons[:_NAMED])
        more = f"; and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
        raise NothingReadError(
            f"none of {self._lost_in_a_row} training clips in a row can be read: {shown}{more}: mend them, or the disk "
            "they lie on, and resume; or let vidreason init set them aside, and start the stage again"
        )

    def on_train_end(self) -> None:
        """Says, once for all ranks, which clips the fit went without."""
        unread: Counter[str] = sum(map(Counter, self.all_ranks(dict(self._unread))), Counter())
        if unread:
            rank_zero_warn(
                f"{self.stage_name}: {len(unread)} training clip{'s'[: len(unread) > 1]} could not be read and had no "
                f"weight (failed reads: {unread.total()}): {first_five(sorted(unread))}"
            )
        self._unread.clear()
