"""The parameters that are trained: which they are, the norm of their gradient, and the mode of what holds them."""

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


def set_train_mode(model: nn.Module, parent: bool = True) -> None:
    """Puts what holds a trainable parameter into train mode and what holds frozen ones alone into eval mode.

    So a frozen tower's BatchNorm keeps its statistics. What has no parameters (dropout) goes with what it is part of.

    Args:
        model: The module, changed in place with all its parts.
        parent: Mode of what it is part of.
    """
    parameters = list(model.parameters())
    model.training = any(p.requires_grad for p in parameters) if parameters else parent
    for child in model.children():
        set_train_mode(child, model.training)
