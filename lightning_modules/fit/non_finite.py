"""Stops a run at the first loss, gradient, weight or log-probability that is NaN or infinite."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from vidreason.datamodules.splits import first_five
from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_modules.fit.same_fit import stage_name
from vidreason.lightning_modules.functional.finite import NonFiniteError
from vidreason.lightning_modules.weights.parameters import grad_norm, trainable


class StopOnNonFinite(L.Callback):
    """Checks losses and gradients before every optimizer step, and the weights after every batch.

    All ranks stop together. No checkpoint or weights are written then, so that those of the last good step stay.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._clips: tuple[str, ...] = ()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Takes the names of the clips, for the message."""
        self._clips = tuple(batch.video_ids) if isinstance(batch, VideoBatch) else ()
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._losses.clear()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Keeps the loss of a micro-batch; reading it here would wait for the GPU."""
        self._losses.append(loss.detach().float())

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Checks the losses and the gradient of an optimizer step.

        Raises:
            NonFiniteError: On all ranks, if one of them is not finite on any rank.
        """
        device = trainer.strategy.root_device
        losses = torch.stack(self._losses or [torch.zeros(())])
        self._losses.clear()
        finite = [torch.isfinite(losses).all().to(device)]
        if getattr(trainer.precision_plugin, "scaler", None) is None:  # which meets infinities and skips their steps
            finite.append(torch.isfinite(grad_norm(trainable(pl_module))).to(device))
        bad = trainer.strategy.reduce((~torch.stack(finite)).float(), reduce_op="sum").tolist()
        for number, what in zip(bad, ("loss is", "gradient is"), strict=False):
            if number:
                raise NonFiniteError(
                    self._message(trainer, pl_module, f"the {what} not finite", trainer.global_step + 1)
                )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Checks the trained weights.

        Raises:
            NonFiniteError: On all ranks, if a weight is not finite.
        """
        largest = torch.nn.utils.get_total_norm([p.detach() for p in trainable(pl_module)], norm_type=float("inf"))
        largest = largest.full_tensor() if isinstance(largest, DTensor) else largest
        if not bool(torch.isfinite(largest)):
            what = "the trained weights are not finite after this step"
            raise NonFiniteError(self._message(trainer, pl_module, what, trainer.global_step))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Adds stage and step to the message of an error that arose where they are not known."""
        if isinstance(exception, NonFiniteError) and not str(exception).startswith("stage "):
            exception.args = (f"{_place(trainer, pl_module, trainer.global_step)}: {exception}",)

    def _message(self, trainer: L.Trainer, module: L.LightningModule, what: str, step: int) -> str:
        clips = f", clips {first_five(self._clips)}" if self._clips else ""
        return (
            f"{_place(trainer, module, step)}: {what}{clips}: lower the learning rate, or look at these clips; the "
            "last checkpoint is that of an earlier step, and nothing was written since"
        )


def _place(trainer: L.Trainer, module: L.LightningModule, step: int) -> str:
    rates = [float(optimizer.param_groups[0]["lr"]) for optimizer in trainer.optimizers]
    rate = f", learning rate {rates[0]:g}" if rates and trainer.training else ""
    return f"stage {stage_name(module)}, optimizer step {step}{rate}"
