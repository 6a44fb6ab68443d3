"""The optimizer step of all stages: forward and backward per micro-batch, clipping, step, schedule.

Gradients of micro-batches accumulate, so that every loss is divided by counts of the whole step, not of its
micro-batch: the step does not depend on the micro-batches. This needs manual optimisation: the closure of Lightning's
automatic optimisation calls ``zero_grad`` after ``training_step``, which would drop all micro-batches but the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vidreason.lightning_modules.weights.parameters import grad_norm

T = TypeVar("T")

_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16")  # the last three are short names


@dataclass(frozen=True)
class UpdateOptions:
    """Options of an optimizer step.

    Args:
        clips_per_forward: Clips per micro-batch; null is all of them. It limits memory and changes neither loss nor
            gradient.
        max_grad_norm: Norm to which larger gradients are scaled down; 0 disables clipping.
    """

    clips_per_forward: int | None = None
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.clips_per_forward is not None and self.clips_per_forward < 1:
            raise ValueError(f"updates.clips_per_forward must be at least 1 or null, got {self.clips_per_forward}")
        if not self.max_grad_norm >= 0:  # NaN is not, either
            raise ValueError(f"updates.max_grad_norm must not be negative (0 is off), got {self.max_grad_norm}")

    @property
    def per_batch(self) -> int:
        """Number of optimizer steps per batch."""
        return 1


class StepResult(NamedTuple):
    """Statistics of an optimizer step."""

    grad_norm: Tensor
    """[] 2-norm of the gradient before clipping."""
    learning_rate: float
    """Learning rate of the first parameter group in this step."""


@dataclass(frozen=True)
class OptimizerStep:
    """Runs optimizer steps on the trained parameters.

    Args:
        strategy: The trainer's strategy, which runs the backward pass and synchronises gradients.
        optimizer: Lightning's wrapper of the optimizer, which counts the steps.
        scheduler: Learning-rate schedule, stepped after every optimizer step.
        parameters: The trained parameters.
        max_grad_norm: Norm to which larger gradients are scaled down; 0 disables clipping.
    """

    strategy: Strategy
    optimizer: Optimizer
    scheduler: LRScheduler | None
    parameters: Sequence[nn.Parameter]
    max_grad_norm: float

    def __call__(self, micro_batches: Sequence[T], loss: Callable[[T], Tensor], has_samples: bool = True) -> StepResult:
        """Runs one optimizer step.

        Args:
            micro_batches: The micro-batches; at least one, and the same number on every rank.
            loss: Runs the forward pass of a micro-batch and returns its share of the step's loss.
            has_samples: Whether anything counts in this step on any rank. If not, no parameter gets a gradient, so that
                momentum and weight decay leave the weights unchanged.
        """
        self.optimizer.zero_grad()
        for number, micro_batch in enumerate(micro_batches, start=1):
            with self._synchronise(last=number == len(micro_batches)):
                self.strategy.backward(loss(micro_batch), None)
        norm = grad_norm(self.parameters)
        if self.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        if not has_samples:  # the step below still runs, since Lightning and the schedule count it
            self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return StepResult(norm, learning_rate)

    def _synchronise(self, last: bool) -> AbstractContextManager[object]:
        """Returns the context of a backward pass, in which only the last one exchanges gradients between ranks."""
        if last or not isinstance(self.strategy, ParallelStrategy):
            return nullcontext()
        context: AbstractContextManager[object] = self.strategy.block_backward_sync()
        return context


def check_precision(precision: str) -> None:
    """Checks that a trainer's precision leaves the dtype of weights to the vlm section.

    Raises:
        ValueError: If it converts all weights and batches; the message names what to set instead.
    """
    if precision not in _PRECISIONS:
        raise ValueError(
            f"trainer.precision is {precision}, which would convert the trained weights, too: leave it at 32-true (or "
            "bf16-mixed) and set vlm.init_args.dtype to bfloat16, which computes in bfloat16 and keeps what is trained "
            "in float32"
        )


def _check_counts(trainer: L.Trainer) -> None:
    for option in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(trainer, option) == 0:
            raise ValueError(f"trainer.{option} is 0, so that nothing would be trained: raise it")
    for option in ("val_check_interval", "check_val_every_n_epoch"):
        if getattr(trainer, option, None) == 0:
            raise ValueError(f"trainer.{option} is 0: raise it; trainer.limit_val_batches 0 switches validation off")


def check_trainer(trainer: L.Trainer, stage: str, automatic: bool, updates: UpdateOptions) -> None:
    """Checks the precision, and for a fit that no option is set that the stage's way of optimising ignores.

    Args:
        trainer: As configured.
        stage: Name of the stage.
        automatic: Whether Lightning optimises on the loss that ``training_step`` returns.
        updates: The stage's options of an optimizer step.

    Raises:
        ValueError: If one is set; the message names the option to use instead.
    """
    check_precision(str(trainer.precision))
    if trainer.state.fn != TrainerFn.FITTING:
        return
    _check_counts(trainer)
    if automatic:
        if updates != UpdateOptions():
            raise ValueError(
                f"model.init_args.updates has no effect in stage {stage}, which returns its loss to Lightning: set "
                "trainer.gradient_clip_val and trainer.accumulate_grad_batches"
            )
        return
    if trainer.gradient_clip_val:
        raise ValueError(
            f"trainer.gradient_clip_val has no effect in stage {stage}: set model.init_args.updates.max_grad_norm"
        )
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches has no effect in stage {stage}: set model.init_args.batch_size to the "
            "clips of one optimizer step, and model.init_args.updates.clips_per_forward to those that fit into memory"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        # Clipping needs unscaled gradients, and Lightning would unscale them a second time.
        raise ValueError(
            f"trainer.precision is {trainer.precision}, whose loss scaling stage {stage} does not support: use "
            "bf16-mixed, or 32-true"
        )
