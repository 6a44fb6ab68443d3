"""Exchanges between ranks: objects of every rank, rows of every rank, and means over ranks."""

from __future__ import annotations

from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, distributed

T = TypeVar("T")


def gather_objects(own: T) -> list[T]:
    """Returns the objects of all ranks in rank order; all ranks have to call it together."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, own)
    return found


def all_gather_rows(module: L.LightningModule, values: Tensor) -> Tensor:
    """Returns the rows [B, ...] of all ranks in rank order on the CPU; every rank must have the same number."""
    if not isinstance(module.trainer.strategy, ParallelStrategy):
        return values
    gathered = module.all_gather(values.to(module.device))
    assert isinstance(gathered, Tensor)
    return gathered.reshape(-1, *values.shape[1:]).cpu()


def mean_over_ranks(trainer: L.Trainer, counts: Tensor) -> Tensor:
    """Returns the mean of counts over the ranks.

    Strategies average gradients over ranks. Dividing each rank's sum by the mean count therefore gives the gradient of
    the sum over all ranks divided by the count of all ranks.
    """
    mean: Tensor = trainer.strategy.reduce(counts.float(), reduce_op="mean")
    return mean
