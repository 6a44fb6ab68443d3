"""How far a fit is, in whole batches, and how Lightning's loops are told when it goes on from there.

Lightning writes its loops down as they stand, in the middle of a batch, of an epoch's end or of a validation, and draws
other conclusions from each on restart. Here a checkpoint says how many batches are done and whether a validation of the
last one is due; on restart the loops get the counters of the one place each from which they go on correctly.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerStatus


@dataclass(frozen=True)
class FitProgress:
    """What has been trained on."""

    batches: int
    """Since the fit began; one that was interrupted does not count"""
    per_epoch: int
    """Batches"""
    accumulated: int
    """Batches per optimizer step (``accumulate_grad_batches``)"""
    validation_due: bool
    """The validation behind the last batch was interrupted"""

    @classmethod
    def of(cls, trainer: L.Trainer) -> FitProgress:
        """Reads it off a trainer in whatever hook of a fit."""
        interrupted = trainer.state.status == TrainerStatus.INTERRUPTED
        return cls(
            batches=batches_done(trainer),
            per_epoch=batches_per_epoch(trainer),
            accumulated=trainer.accumulate_grad_batches,
            validation_due=trainer.validating and interrupted,
        )

    @property
    def logged_steps(self) -> int:
        """Optimizer steps as loggers count them: GRPO's several updates on a batch are one."""
        epochs, rest = divmod(self.batches, self.per_epoch)
        return epochs * math.ceil(self.per_epoch / self.accumulated) + rest // self.accumulated

    def state(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return asdict(self)

    def tell(self, loops: dict[str, Any]) -> None:
        """Rewrites the state of Lightning's loops in a checkpoint, in place.

        Args:
            loops: ``checkpoint["loops"]["fit_loop"]``.
        """
        done, stepped = self.batches, self.logged_steps
        epoch, batch = divmod(max(done - 1, 0), self.per_epoch)
        in_epoch = min(done, batch + 1)
        begun = int(done > 0)
        loops["epoch_progress"] = _both(_counters(epoch + begun, processed=epoch, completed=epoch))
        # between two batches, as Lightning's own hook at the end of a batch has it: one is not yet ``completed``
        open_batch = begun and not self.validation_due
        loops["epoch_loop.batch_progress"] = {
            "total": _counters(done, completed=done - open_batch),
            "current": _counters(in_epoch, completed=in_epoch - open_batch),
            "is_last_batch": begun == 1 and in_epoch == self.per_epoch,
        }
        begun_validation = int(self.validation_due)
        loops["epoch_loop.val_loop.batch_progress"] = {
            **_both(_counters(begun_validation, processed=0, completed=0)),
            "is_last_batch": False,
        }
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = stepped - begun


def batches_done(trainer: L.Trainer) -> int:
    """How many batches a fit has been trained on, over all epochs."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]


def batches_per_epoch(trainer: L.Trainer) -> int:
    """How many batches an epoch has; a number that is never reached where its loader cannot say."""
    return int(min(trainer.num_training_batches, 2**53))


def set_logged_steps(trainer: L.Trainer, progress: FitProgress) -> None:
    """Lets loggers go on counting where they were; Lightning's restart counts a step too many in some places."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = progress.logged_steps


def _counters(ready: int, processed: int | None = None, completed: int | None = None) -> dict[str, int]:
    return {
        "ready": ready,
        "started": ready,
        "processed": ready if processed is None else processed,
        "completed": ready if completed is None else completed,
    }


def _both(counters: dict[str, int]) -> dict[str, Any]:
    return {"total": dict(counters), "current": dict(counters)}
