"""The progress of a fit in finished batches, and how it is restored into Lightning's loops."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerStatus

from vidreason.lightning_internals import (
    batches_done,
    batches_per_epoch,
    write_loop_state,
)


@dataclass(frozen=True)
class FitProgress:
    """The finished batches of a fit."""

    batches: int
    """Finished batches since the fit began; an interrupted batch does not count."""
    per_epoch: int
    """Batches per epoch."""
    accumulated: int
    """Batches per optimizer step (``accumulate_grad_batches``)."""
    validation_due: bool
    """True if the validation after the last batch was interrupted and has to run again."""

    @classmethod
    def of(cls, trainer: L.Trainer) -> FitProgress:
        """Reads the progress from a trainer, in any hook of a fit."""
        interrupted = trainer.state.status == TrainerStatus.INTERRUPTED
        return cls(
            batches=batches_done(trainer),
            per_epoch=batches_per_epoch(trainer),
            accumulated=trainer.accumulate_grad_batches,
            validation_due=trainer.validating and interrupted,
        )

    @property
    def logged_steps(self) -> int:
        """Number of steps as loggers count them: several updates on one GRPO batch are one step."""
        # An epoch whose batches do not divide evenly ends with a shorter accumulation.
        epochs, rest = divmod(self.batches, self.per_epoch)
        return epochs * math.ceil(self.per_epoch / self.accumulated) + rest // self.accumulated

    @property
    def at_epoch_end(self) -> bool:
        """True if the next batch is the first of an epoch."""
        return self.batches % self.per_epoch == 0

    def write_into(self, loops: dict[str, Any]) -> None:
        """Makes Lightning's fit loop continue from here; ``loops`` is ``checkpoint["loops"]["fit_loop"]``."""
        write_loop_state(loops, self.batches, self.per_epoch, self.validation_due, self.logged_steps)

    def state(self) -> dict[str, Any]:
        """Returns the fields as plain values for a checkpoint."""
        return asdict(self)
