"""Weights that are held in fp32 for the optimizer and used in half precision in forwards.

A step of lr 1e-6 is smaller than half the spacing of most bfloat16 weights, so that rounding would undo it. The fp32
parameters are cast at the time of use, module by module: activations and what autograd keeps of them are in half
precision, gradients arrive in fp32. This holds without autocast and under it, with gradient checkpointing and FSDP2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

_HALF = (torch.bfloat16, torch.float16)


class _Cast:
    """Forward hooks of one module that replace its fp32 parameters by half-precision copies during its forward.

    Args:
        dtype: Dtype of the copies and of floating-point inputs; None takes that of the input, which stays as it is.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.held: list[dict[str, nn.Parameter]] = []  # A stack, since a head may be called within its own hooks.

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        dtype = args[0].dtype if self.dtype is None else self.dtype
        own = module._parameters
        full = {name: p for name, p in own.items() if p is not None and p.dtype == torch.float32 != dtype}
        self.held.append(full)
        own.update({name: parameter.to(dtype) for name, parameter in full.items()})  # type: ignore[misc]  # for this forward only
        if self.dtype is None:
            return args
        return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    def after(self, module: nn.Module, args: object, output: object) -> None:
        module._parameters.update(self.held.pop())

    def attach(self, module: nn.Module) -> None:
        """Registers the hooks; ``after`` also runs if the forward raises."""
        module.register_forward_pre_hook(self.before)
        module.register_forward_hook(self.after, always_call=True)
        module.cast_in_forward = self.dtype  # type: ignore[assignment]  # a plain attribute


def compute_in_input_dtype(model: PeftModel) -> None:
    """Makes the LoRA layers of a model use their fp32 weights in the dtype of their input.

    PEFT copies the input to fp32 instead, once for each adapted layer, and autograd keeps the copies.
    """
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        layer.cast_input_dtype_enabled = False
        for linear in (*layer.lora_A.values(), *layer.lora_B.values()):
            if not hasattr(linear, "cast_in_forward"):
                _Cast(None).attach(linear)


def keep_master_weights(model: nn.Module) -> None:
    """Holds the trained half-precision parameters of a model in fp32, which forwards use in their former dtype."""
    trained = {id(p): p.dtype for p in model.parameters() if p.requires_grad and p.dtype in _HALF}
    for module in model.modules():
        dtypes = [trained[id(p)] for p in module.parameters(recurse=False) if id(p) in trained]
        if dtypes and not hasattr(module, "cast_in_forward"):
            _Cast(dtypes[0]).attach(module)
    for parameter in model.parameters():
        if id(parameter) in trained:
            parameter.data = parameter.data.float()


def compute_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Returns the dtype in which forwards use a parameter, for every parameter that is held in fp32 for the optimizer.

    Returns:
        Name of the parameter to its dtype; tied parameters have several names.
    """
    found = {}
    for name, module in model.named_modules():
        dtype = getattr(module, "cast_in_forward", None)
        for key, parameter in module.named_parameters(recurse=False):
            if dtype is not None and parameter.dtype == torch.float32:
                found[f"{name}.{key}" if name else key] = dtype
    return found


def as_computed(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the entries of a state dict in the dtypes in which forwards use them."""
    dtypes = compute_dtypes(model)
    return {name: value.to(dtypes.get(name, value.dtype)) for name, value in state.items()}


@contextmanager
def in_compute_dtype(model: nn.Module) -> Iterator[None]:
    """Holds all parameters in the block in the dtype in which forwards use them, and fp32 again after it.

    Every forward in the block is spared the cast, which would double the time of a decoding step. Nothing may be
    trained in the block.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    before = {}
    for name, dtype in compute_dtypes(model).items():
        parameter = parameters[name]
        if id(parameter) not in before:
            before[id(parameter)] = (parameter, parameter.data)
            parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in before.values():
            parameter.data = data
