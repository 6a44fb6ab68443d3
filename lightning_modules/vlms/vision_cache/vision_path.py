"""The vision path from pixels to input embeddings of the decoder: its modules, its hash, and whether it is fixed.

It is every part of a model except decoder and head: tower, merger or projector, connector, ``image_newline``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from vidreason.lightning_modules.vlms.prefix.layout import unwrap

VOLATILE = ("text_config", "_name_or_path", "transformers_version", "quantization_config", "dtype")
"""Keys of a configuration that embeddings do not depend on, or that are in the cache key separately."""


class Part(NamedTuple):
    """A module of the path with its dotted name."""

    name: str
    module: nn.Module


def path_parts(model: nn.Module) -> list[Part]:
    """Returns all modules between pixels and input embeddings, at every depth."""
    base = unwrap(model)
    apart = [base.get_decoder(), base.get_input_embeddings(), base.get_output_embeddings()]
    outside = {id(inner) for module in apart if module is not None for inner in module.modules()}
    return [Part(name, module) for name, module in base.named_modules() if id(module) not in outside]


def path_tensors(parts: list[Part]) -> Iterator[tuple[str, Tensor]]:
    """Yields the names, parameters and buffers of the path."""
    for name, module in parts:
        for own, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield f"{name}.{own}".lstrip("."), tensor


def why_not_fixed(parts: list[Part]) -> str | None:
    """Returns why embeddings cannot be cached; None if the same pixels always give the same embeddings."""
    for name, module in parts:
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            return f"{name} carries an adapter"
        if name and isinstance(module, FSDPModule):  # the root may be sharded: every rank runs it anyway
            return f"{name} is sharded, and ranks that skip its forward would keep the others waiting"
        if module.training and isinstance(module, _BatchNorm):
            return f"{name} normalises over the batch while it is in train mode"
        if module.training and _drops(module):
            return f"{name} drops activations at random while it is in train mode"
    tensors = list(path_tensors(parts))
    for name, tensor in tensors:
        if tensor.requires_grad:
            return f"{name} is trained"
        if isinstance(tensor, DTensor):
            return f"{name} is sharded"
    return None if tensors else "the model does not tell its decoder from what comes before it"


def _drops(module: nn.Module) -> bool:
    rates = [getattr(module, name, 0.0) for name in ("attention_dropout", "dropout")]
    own = [module.p] if isinstance(module, _DropoutNd) else []
    return any(isinstance(rate, float) and rate > 0 for rate in (*own, *rates))


def marks(parts: list[Part]) -> tuple[tuple[int, int], ...]:
    """Returns addresses and version counters, which change if a tensor of the path is replaced or written to."""
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for _, t in path_tensors(parts))


class PathHashes:
    """Hashes of vision paths; each, which takes seconds, is kept until a tensor of its path is written to."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, tuple[tuple[tuple[int, int], ...], str]] = WeakKeyDictionary()

    def of(self, model: nn.Module, parts: list[Part]) -> str:
        """Returns the ``path_sha`` of a model."""
        now = marks(parts)
        if model not in self._known or self._known[model][0] != now:
            self._known[model] = (now, path_sha(model, parts))
        return self._known[model][1]


def path_sha(model: nn.Module, parts: list[Part]) -> str:
    """Returns the SHA-256 of the path's parameters, buffers, 4-bit quantisation state and configuration.

    Args:
        model: The model.
        parts: Its ``path_parts``.
    """
    base = unwrap(model)
    config: dict[str, Any] = base.config.to_dict()
    fixed = {key: value for key, value in config.items() if key not in VOLATILE}
    digest = hashlib.sha256(json.dumps([type(base).__name__, fixed], sort_keys=True, default=str).encode())
    tensors = dict(path_tensors(parts))
    for name, module in parts:
        packed: Any = getattr(module, "weight", None)
        if hasattr(packed, "quant_state"):  # 4-bit weights keep their scales outside parameters and buffers
            # not module.state_dict(), which would shard gathered weights again
            state: dict[str, Any] = packed.quant_state.as_dict(packed=True)
            tensors |= {f"{name}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Returns the values of a tensor as bytes; copied, since NumPy blocks resizing of shared storage."""
    flat = tensor.detach().to("cpu", copy=True).contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers
