"""Which parameters train: their list, their gradient's norm, and the mode of the modules that hold them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that require a gradient."""
    return [p for p in module.parameters() if p.requires_grad]


def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Returns the 2-norm of all gradients, a scalar, gathered where it is sharded."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def set_train_mode(model: nn.Module) -> None:
    """Puts every module that holds a trainable parameter into train mode and every other into eval mode.

    So a frozen tower's BatchNorm keeps its statistics.
    """
    for module in model.modules():
        module.training = any(p.requires_grad for p in module.parameters())
