"""The optimizer, its learning-rate schedule, and the number of optimizer steps of a fit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import get_scheduler

from vidreason.datamodules.clips.samplers import batches_of_an_epoch
from vidreason.lightning_modules.vlms.prefix.layout import is_sharded
from vidreason.lightning_modules.weights.parameters import trainable


@dataclass(frozen=True)
class OptimOptions:
    """Options of the optimizer and its learning rate.

    Args:
        optimizer: The optimizer, without its parameters.
        schedule: Learning-rate schedule over optimizer steps, after the warm-up.
        warmup: Length of the warm-up: a share of all optimizer steps (below 1), or a number of them (1 and above).
    """

    optimizer: OptimizerCallable = torch.optim.AdamW
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < math.inf:
            raise ValueError(f"optim.warmup must be a share of the steps or a number of them, got {self.warmup}")

    def described(self) -> dict[str, Any]:
        """Returns what a resumed fit must have in common with the interrupted one, as plain values."""
        defaults = self._make([nn.Parameter(torch.zeros(1))]).defaults
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
        kept = {key: value for key, value in plain.items() if isinstance(value, bool | int | float | str | list)}
        return {**kept, "schedule": self.schedule, "warmup": self.warmup}

    def _make(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Returns the optimizer; a number that it refuses, such as a rate of NaN, is an error that names the option."""
        try:
            return self.optimizer(parameters)
        except ValueError as error:
            raise ValueError(f"model.init_args.optim.optimizer: {error}; give a number that it takes") from error

    def build(self, module: nn.Module, total_steps: int) -> Any:
        """Returns the optimizer of all trainable parameters and a schedule that is stepped after every step.

        Args:
            module: The stage.
            total_steps: Optimizer steps of the fit.

        Raises:
            ValueError: If nothing is trainable, or the optimizer does not support sharded weights.
        """
        parameters = trainable(module)
        if not parameters:
            raise ValueError("nothing to train: give the vlm section lora options or leave its weights unfrozen")
        optimizer = self._make(parameters)
        if is_sharded(module) and type(optimizer).__module__.startswith("bitsandbytes"):
            raise ValueError(
                f"{type(optimizer).__name__} cannot step sharded weights: set model.init_args.optim.optimizer to "
                "torch.optim.AdamW, or choose a strategy that does not shard (configs/strategy/qlora.yaml)"
            )
        warmup = round(self.warmup * total_steps) if self.warmup < 1 else int(self.warmup)
        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
        if not any(scheduler.base_lrs):
            raise ValueError("model.init_args.optim.optimizer: lr is 0, so that nothing can be learnt: raise it")
        if not any(scheduler.lr_lambdas[0](step) for step in range(total_steps)):
            rank_zero_warn(
                f"the learning rate is 0 in all {total_steps} steps, a warm-up of {warmup}: nothing is learnt"
            )
        # Automatic optimisation steps the schedule by the interval; in manual optimisation the stage does.
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def count_steps(trainer: L.Trainer, batches: int, updates_per_batch: int = 1) -> int:
    """Returns the number of optimizer steps of a fit.

    ``Trainer.estimated_stepping_batches`` is not used: it starts the loaders before a checkpoint is restored, and their
    workers would fetch the clips of the first epoch.

    Args:
        trainer: The configured trainer.
        batches: Number of batches of the training loader.
        updates_per_batch: Optimizer steps per batch.

    Raises:
        ValueError: If the trainer has neither ``max_epochs`` nor ``max_steps``, since a schedule needs an end.
    """
    limits = [] if trainer.max_steps == -1 else [trainer.max_steps]
    if trainer.max_epochs is not None and trainer.max_epochs != -1:
        steps = math.ceil(batches_of_an_epoch(trainer, batches) / trainer.accumulate_grad_batches)
        limits.append(steps * updates_per_batch * trainer.max_epochs)
    if not limits:
        raise ValueError("set trainer.max_epochs or trainer.max_steps: the schedule needs to know where it ends")
    return max(1, min(limits))
