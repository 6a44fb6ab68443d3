"""Counts the bytes of tensors that are alive, for real and for fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make in the block, until they are freed.

    Each storage counts once, at the operation that returns it, and with all of its bytes. What a kernel allocates for
    itself does not count. Storages that exist before the block do not count either, if they are given as ``known``.

    Args:
        known: Tensors that do not count, such as parameters.
        vocabulary: Size of the last axis of logits, which are counted separately; None counts none.

    Attributes:
        now: Bytes alive.
        peak: Largest number of bytes alive since the block was entered.
        logits_at_peak: Bytes of logits at that moment, except those that autograd had saved.
    """

    def __init__(self, known: Iterable[Tensor] = (), vocabulary: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.logits_at_peak = 0
        self._vocabulary = vocabulary
        self._logits = 0
        self._saved: dict[int, int] = {}
        # The storages are held, since the address of a freed one is used again.
        self._known = {_key(tensor): tensor.untyped_storage() for tensor in known}
        self._alive: dict[int, weakref.ref[Any]] = {}

    @property
    def saved(self) -> int:
        """Bytes that autograd saved in blocks of ``saving``, except those of the known tensors."""
        return sum(self._saved.values())

    def saving(self) -> saved_tensors_hooks:
        """Returns a context in which the tensors that autograd saves are counted."""
        return saved_tensors_hooks(self._save, lambda tensor: tensor)

    def _save(self, tensor: Tensor) -> Tensor:
        if _key(tensor) not in self._known:
            self._saved[_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation and counts the storages of its results."""
        if func in _INDEXING:
            args = (args[0], _by_numbers(args[1]), *args[2:])
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self._alive or key in self._known:
            return
        storage = tensor.untyped_storage()
        size, logits = storage.nbytes(), tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary
        self._alive[key] = weakref.ref(storage, self._freed(key, size, logits))
        self.now += size
        self._logits += size * logits
        if self.now > self.peak:
            self.peak, self.logits_at_peak = self.now, self._logits

    def _freed(self, key: int, size: int, logits: bool) -> Callable[[object], None]:
        def forget(_: object) -> None:
            del self._alive[key]
            self.now -= size
            self._logits -= size * logits

        return forget


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _by_numbers(index: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns an index with boolean masks as positions: how many are True, a fake tensor could not tell."""
    found: list[Tensor | None] = []
    for part in index:
        if isinstance(part, Tensor) and part.dtype == torch.bool and not isinstance(part, FakeTensor):
            found += part.nonzero(as_tuple=True)
        else:
            found.append(part)
    return found
