"""One optimizer step of any stage: micro-batches forward and backward, clip, step, schedule (manual optimisation).

Gradients of micro-batches add up, so every loss is divided by counts of the *whole* step, never of its micro-batch: the
step is then the same for any cut. All three stages use it; Lightning's automatic optimisation cannot, because its
closure calls ``zero_grad`` after ``training_step`` and drops every micro-batch but the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vidreason.datamodules.types import Encoded, VideoBatch
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.completions import take_prompts
from vidreason.lightning_modules.weights.parameters import grad_norm

T = TypeVar("T")


@dataclass(frozen=True)
class UpdateOptions:
    """How an optimizer step is made.

    Args:
        clips_per_forward: Clips that go through the model at once; null is all of them. It bounds the memory and
            changes neither loss nor gradient.
        max_grad_norm: Largest norm of the gradient; a larger one is scaled down to it. 0 does not clip.
    """

    clips_per_forward: int | None = None
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.clips_per_forward is not None and self.clips_per_forward < 1:
            raise ValueError(f"updates.clips_per_forward must be at least 1 or null, got {self.clips_per_forward}")
        if self.max_grad_norm < 0:
            raise ValueError(f"updates.max_grad_norm must not be negative (0 is off), got {self.max_grad_norm}")

    @property
    def per_batch(self) -> int:
        """Optimizer steps on each batch."""
        return 1


class StepResult(NamedTuple):
    """What an optimizer step did."""

    grad_norm: Tensor
    """[] norm of the gradient before clipping."""
    learning_rate: float
    """Rate of the first parameter group in this step."""


@dataclass(frozen=True)
class OptimizerStep:
    """Makes optimizer steps on the parameters that are trained.

    Args:
        strategy: The trainer's; it runs the backward pass and synchronises gradients.
        optimizer: Lightning's wrapper around the optimizer, which counts the steps.
        scheduler: Stepped after every optimizer step.
        parameters: The trained parameters.
        max_grad_norm: As in :class:`UpdateOptions`.
    """

    strategy: Strategy
    optimizer: Optimizer
    scheduler: LRScheduler
    parameters: Sequence[nn.Parameter]
    max_grad_norm: float

    def __call__(self, micro_batches: Sequence[T], loss: Callable[[T], Tensor], has_samples: bool = True) -> StepResult:
        """Makes one step.

        Args:
            micro_batches: What goes through the model one after the other; at least one, and as many on every rank.
            loss: Runs the forward pass of a micro-batch and returns its share of the step's loss.
            has_samples: Whether anything counts in this step on any rank. Without samples the gradient is dropped:
                momentum and weight decay would otherwise move the weights.
        """
        self.optimizer.zero_grad()
        for number, micro_batch in enumerate(micro_batches, start=1):
            with self._synchronise(last=number == len(micro_batches)):
                self.strategy.backward(loss(micro_batch), None)
        norm = grad_norm(self.parameters)
        if self.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        if not has_samples:
            self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.step()
        self.scheduler.step()
        return StepResult(norm, learning_rate)

    def _synchronise(self, last: bool) -> AbstractContextManager[object]:
        """Lets ranks exchange gradients in the last backward pass only."""
        if last or not isinstance(self.strategy, ParallelStrategy):
            return nullcontext()
        context: AbstractContextManager[object] = self.strategy.block_backward_sync()
        return context


def split_clips(vlm: VLM, batch: VideoBatch, clips_per_forward: int | None) -> list[VideoBatch]:
    """Cuts a batch into micro-batches of at most ``clips_per_forward`` clips, each with its texts."""
    size = clips_per_forward or len(batch)
    if size >= len(batch):
        return [batch]
    parts = []
    for start in range(0, len(batch), size):
        stop = min(start + size, len(batch))
        index = torch.arange(start, stop, device=batch.labels.device)
        encoded = Encoded(take_prompts(vlm, batch.prompts, index), batch.texts.behind(start, stop))
        parts.append(VideoBatch(encoded, batch.labels[index], batch.sample_mask[index], batch.clips[start:stop]))
    return parts


def check_trainer_options(trainer: L.Trainer, stage: str) -> None:
    """Refuses options of the trainer that manual optimisation would ignore or that it cannot serve.

    Raises:
        ValueError: Naming the option and the one to use instead.
    """
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
        # The scaler would have to unscale the gradients before they are clipped, and Lightning unscales them again.
        raise ValueError(
            f"trainer.precision is {trainer.precision}, whose loss scaling stage {stage} does not support: use "
            "bf16-mixed, or 32-true"
        )
