"""How much a stage has to do, counted before it begins; how long a pipeline will take is estimated from it.

No weights and no tensors: a command line that only adds up need not import them.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import lightning as L


@dataclass(frozen=True)
class Work:
    """What one rank sends through the model."""

    clips_read: float = 0.0
    """Encoded without gradient, to decide or to write about them"""
    clips_learnt: float = 0.0
    """Encoded with gradient"""
    texts_scored: float = 0.0
    """Run behind a clip without gradient"""
    texts_learnt: float = 0.0
    """Run behind a clip with gradient"""
    texts_written: float = 0.0
    """Generated"""

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * value for value in astuple(self)))


class FitLength(NamedTuple):
    """How long a fit is."""

    batches: int
    """Of one rank"""
    validations: int


def clips_taken(clips: int, batch_size: int, limit: float | None) -> float:
    """Returns how many clips a loop goes through, given one of the trainer's ``limit_*_batches``.

    Args:
        clips: How many there are.
        batch_size: Clips per batch, of all ranks together.
        limit: A number of batches, or a share of them; null is all.
    """
    if isinstance(limit, int):
        return min(clips, limit * batch_size)
    return clips if limit is None else clips * limit


def epochs_to_take(epochs: int, steps: int, min_steps: int, every: int) -> int:
    """Returns how many epochs make at least ``min_steps``; the last one is validated.

    Args:
        epochs: As configured.
        steps: Optimizer steps in these.
        min_steps: Steps to take at least.
        every: Epochs from validation to validation.

    >>> epochs_to_take(20, 40, 160, every=15)
    90
    """
    return epochs if steps >= min_steps else math.ceil(math.ceil(epochs * min_steps / steps) / every) * every


def length_of_fit(trainer: L.Trainer, clips: float, batch_size: int, min_steps: int, updates: int) -> FitLength | None:
    """Counts batches and validations.

    Args:
        trainer: As configured; nothing has run yet.
        clips: Training clips of an epoch.
        batch_size: Clips per batch, of all ranks together.
        min_steps: Optimizer steps at least, unless ``trainer.max_steps`` is set.
        updates: Optimizer steps that follow a batch.

    Returns:
        None where nothing says when the fit ends.
    """
    an_epoch = max(1, math.ceil(clips / batch_size))
    epochs, steps = trainer.max_epochs, trainer.max_steps
    limits = [] if steps == -1 else [math.ceil(steps / updates)]
    if epochs is not None and epochs != -1:
        if steps == -1:
            epochs = epochs_to_take(
                epochs, epochs * an_epoch * updates, min_steps, trainer.check_val_every_n_epoch or 1
            )
        limits.append(epochs * an_epoch)
    if not limits:
        return None
    batches = min(limits)
    return FitLength(batches, _validations(trainer, batches, an_epoch))


def _validations(trainer: L.Trainer, batches: int, an_epoch: int) -> int:
    """How often the trainer validates: ``val_check_interval`` counts batches, as an int, or is a share of an epoch."""
    interval = trainer.val_check_interval
    between = interval if isinstance(interval, int) else max(1, int(an_epoch * float(interval or 1.0)))
    every = trainer.check_val_every_n_epoch
    if every is None:
        return batches // between
    epochs, rest = divmod(batches, an_epoch)
    return epochs // every * (an_epoch // between) + (rest // between if (epochs + 1) % every == 0 else 0)
