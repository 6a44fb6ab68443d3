"""The trained parameters of a model, the norm of their gradient, and the mode of their modules."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that require a gradient."""
    return [p for p in module.parameters() if p.requires_grad]


def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Returns the 2-norm of all gradients, []; norms of sharded gradients are gathered."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # full_tensor is a collective operation: all ranks have to call it.
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def set_train_mode(model: nn.Module, parent: bool = True) -> None:
    """Sets modules with trainable parameters to train mode and modules with frozen parameters only to eval mode.

    The BatchNorm of a frozen tower then keeps its statistics. Modules without parameters, such as dropout, get the mode
    of their parent.

    Args:
        model: The module, changed in place with all its children.
        parent: Whether the parent is in train mode.
    """
    parameters = list(model.parameters())
    model.training = any(p.requires_grad for p in parameters) if parameters else parent
    for child in model.children():
        set_train_mode(child, model.training)
