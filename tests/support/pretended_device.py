"""A device that does not exist: tensors that say they are on it, and hold values on the CPU.

In a block of ``pretending`` every operation is checked as CUDA would check it: all tensors must be on one device,
except host tensors without dimensions and host indices. What a GPU would have to do is counted: kernels, transfers, and
the places where the host waits for the device. Blind to ``is_cuda`` branches, streams and real kernels.
"""

from __future__ import annotations

import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "pretended"
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
SIZED_BY_VALUES = ("nonzero", "masked_select", "unique_dim", "unique_consecutive", "_unique2", "equal")
"""Operations after which the host waits, since values on the device decide about shapes or control flow."""
READING = (Tensor.tolist, Tensor.numpy)
NO_KERNEL = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "alias")


class MixUpError(RuntimeError):
    """An operation got tensors from the host and from the device."""


@dataclass
class Counts:
    """Counts of what happened in a block of ``pretending``, by place in the code for syncs and transfers."""

    kernels: int = 0
    """Operations on the device that compute or copy; the attention counts as one."""
    syncs: Counter[str] = field(default_factory=Counter)
    """Places at which the host waits for the device."""
    transfers: Counter[str] = field(default_factory=Counter)
    """Places at which tensors are copied between host and device."""


class _State:
    """The state of a block (entered or not) and its counts; a backward pass runs in threads that have no modes."""

    active = False
    counts = Counts()
    inside_kernel = False


def _register() -> torch.device:
    """Registers the device with torch; outside of a block it says that it is not available."""
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: _State.active
    module.device_count = lambda: int(_State.active)
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    backend_registration._setup_privateuseone_for_python_backend(NAME, module)
    return torch.device(NAME, 0)


DEVICE = _register()


def place() -> str:
    """Returns module and line of the innermost frame of vidreason, and of the code that it called there."""
    frame, inner = sys._getframe(1), ""
    while frame is not None:
        file = frame.f_code.co_filename
        module = frame.f_globals.get("__name__", "")  # a path tells nothing: a checkout may have any name
        if module.startswith("vidreason."):
            return f"{module}:{frame.f_lineno}{inner}"
        if "/transformers/" in file and not inner:
            inner = f" (in transformers/{file.rpartition('/transformers/')[2]}:{frame.f_lineno})"
        frame = frame.f_back  # type: ignore[assignment]  # None at the end
    return f"a test{inner}"


class Pretended(Tensor):
    """A tensor on the device; ``held`` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        made: Pretended = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Pretended({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Operations that do not reach the dispatcher, or reach it in pieces."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor):
            device = options.pop("device", None)
            data = _mapped(args[0], Pretended, lambda value: value.item()) if func is torch.tensor else args[0]
            made = func(data, *args[1:], **options)
            return made if device is None else made.to(device)
        if func in READING and isinstance(args[0], Pretended):
            _State.counts.syncs[place()] += 1
            if func is Tensor.numpy:
                raise MixUpError(f"numpy() of a tensor on the device at {place()}")
            return args[0].held.tolist()
        if func is scaled_dot_product_attention and isinstance(args[0], Pretended) and not _State.inside_kernel:
            _State.counts.kernels += 1
            _State.inside_kernel = True
            try:
                return func(*args, **options)
            finally:
                _State.inside_kernel = False
        return func(*args, **options)


def _leaves(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in arguments or results of an operation, which are nested in lists and tuples only."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Returns the same nested lists and tuples, with the items of one type changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(item, kind, change) for item in value])
    return value


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operation on the held values, after checking where its tensors are."""
    tensors = [*_leaves(args), *_leaves([*kwargs.values()])]
    there = _checked(func, args, kwargs, tensors)
    if there and not func.is_view and func.overloadpacket.__name__ not in NO_KERNEL and not _State.inside_kernel:
        _State.counts.kernels += 1
    held = {key: _mapped(value, Pretended, _held) for key, value in kwargs.items()}
    if there and "device" in held:
        held["device"] = torch.device("cpu")
    out = func(*_mapped(args, Pretended, _held), **held)
    if not there:
        _remember_origin(out, tensors)
        return out
    if func._schema.is_mutable and isinstance(args[0], Pretended) and out is args[0].held:
        return args[0]
    return _mapped(out, Tensor, Pretended)


def _checked(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: Sequence[Tensor]) -> bool:
    """Counts syncs and transfers of an operation, and returns whether its result is on the device.

    Raises:
        MixUpError: If a GPU could not run it.
    """
    name, counts = func.overloadpacket.__name__, _State.counts
    on = [isinstance(tensor, Pretended) for tensor in tensors]
    target = kwargs.get("device")
    there = any(on) if target is None else torch.device(target).type == NAME
    if name == "copy_":
        there = on[0]
    if name in ("_to_copy", "copy_"):
        source = on[-1]  # of ``copy_``, the second argument
        if source != there:
            counts.transfers[place()] += 1
            counts.syncs.update([place()] if source else ())
    elif any(on):
        _check(name, func, args, tensors, on)
        if name in ("_local_scalar_dense", *SIZED_BY_VALUES) or _by_bools(name, args) or _repeats(name, args, kwargs):
            counts.syncs[place()] += 1
    return there


def _remember_origin(out: Any, tensors: Sequence[Tensor]) -> None:
    """Notes where a host tensor was made, or the first host tensor that it was computed from."""
    origins = [tensor.made_at for tensor in tensors if hasattr(tensor, "made_at")]
    for leaf in _leaves(out):
        if leaf.dim() and not hasattr(leaf, "made_at"):
            leaf.made_at = origins[0] if origins else place()  # type: ignore[attr-defined]


def _held(tensor: Pretended) -> Tensor:
    return tensor.held


def _check(name: str, func: Any, args: tuple[Any, ...], tensors: Sequence[Tensor], on: Sequence[bool]) -> None:
    """Raises ``MixUpError`` if a GPU could not run the operation."""
    host = [tensor for tensor, there in zip(tensors, on, strict=True) if not there and tensor.dim() > 0]
    if name in INDEXING and on[0]:
        indices = [index for index in args[1] if index is not None]
        moved = [tensor for tensor in host if any(tensor is index for index in indices)]
        _State.counts.transfers.update([place()] * len(moved))
        host = [tensor for tensor in host if not any(tensor is index for index in indices)]
    if host:
        shapes = ", ".join(f"{list(tensor.shape)} made at {getattr(tensor, 'made_at', '?')}" for tensor in host)
        raise MixUpError(f"{func} at {place()} got tensors of the device and of the host: {shapes}")


def _by_bools(name: str, args: tuple[Any, ...]) -> bool:
    if name not in INDEXING:
        return False
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])


def _repeats(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return name == "repeat_interleave" and isinstance(args[-1], Tensor) and kwargs.get("output_size") is None


@contextmanager
def pretending() -> Iterator[Counts]:
    """Counts, in the block, what the device has to do."""
    assert not _State.active, "blocks cannot be nested"
    _State.active, _State.counts = True, Counts()
    try:
        with _Functions(), _Operations():
            yield _State.counts
    finally:
        _State.active = False


def on_device(model: nn.Module) -> nn.Module:
    """Moves parameters and buffers of a model to the device; a tied parameter stays one."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = nn.Parameter(Pretended(parameter.data), requires_grad=parameter.requires_grad)
                module._parameters[name] = moved.setdefault(id(parameter), new)
        module._buffers.update({name: Pretended(b) for name, b in module._buffers.items() if b is not None})
    return model


def on_host(tensor: Tensor) -> Tensor:
    """Returns the values of a tensor on the device."""
    assert isinstance(tensor, Pretended), "a tensor is on the host that should be on the device"
    return tensor.held.detach()
