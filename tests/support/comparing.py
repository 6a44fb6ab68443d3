"""How far tensors are apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all of them together, []."""
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


def relative_gap(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The norm of all differences over the norm of all that is wanted; both have the same names."""
    assert got.keys() == wanted.keys()
    total = norm_of(wanted.values())
    assert float(total) > 0
    return float(norm_of(got[name] - wanted[name] for name in wanted) / total)
