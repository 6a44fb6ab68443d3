"""The output of a vision path as named tensors of one video, and back as what forwards expect of a batch.

Letters: B videos, V visual tokens of a video, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from vidreason.lightning_modules.vlms.vision_cache.embedding_store import Entry

BARE, POOLED, LAYERS = "features", "pooler_output", "deepstack_features"
"""Names in an entry: of a bare tensor, and of the two fields of a tower's output that forwards use."""


@dataclass
class VisionFeatures(ModelOutput):
    """The fields of a vision path's output that forwards use."""

    pooler_output: Any = None
    """A tensor, or a tuple of [V, H] for each video."""
    deepstack_features: Any = None
    """For each layer a tensor, or a tuple of [V, H] for each video; None in families without DeepStack."""


def flatten(features: Any) -> Entry:
    """Converts a vision path's output for one video to named tensors on the CPU that autograd may use.

    Raises:
        ValueError: If the output is neither a tensor nor has pooled features.
    """
    pooled = getattr(features, POOLED, None)
    if isinstance(features, Tensor):
        named: dict[str, Any] = {BARE: features}
    elif pooled is not None:
        named = {POOLED: pooled}
        for layer, value in enumerate(getattr(features, LAYERS, None) or ()):
            named[f"{LAYERS}.{layer}"] = value
    else:
        raise ValueError(
            f"vision embeddings cannot be cached: the vision path returned a {type(features).__name__} without "
            f"{POOLED}; set vlm.vision_cache to null"
        )
    entry: dict[str, Tensor] = {}
    with torch.inference_mode(False):  # autograd, which may read the entry later, rejects inference tensors
        for name, value in named.items():
            items = {name: value} if isinstance(value, Tensor) else {f"{name}/{i}": v for i, v in enumerate(value)}
            entry |= {key: tensor.detach().clone().cpu().contiguous() for key, tensor in items.items()}
    return entry


def join(entries: Sequence[Mapping[str, Tensor]]) -> Any:
    """Joins the entries of B videos to the output that the family's function returns for a batch."""
    if BARE in entries[0]:
        return torch.cat([entry[BARE] for entry in entries])
    names = sorted({name.partition("/")[0] for name in entries[0]})
    layers = sorted((name for name in names if name != POOLED), key=lambda name: int(name.rpartition(".")[2]))

    def field(name: str) -> Tensor | tuple[Tensor, ...]:
        if name in entries[0]:
            return torch.cat([entry[name] for entry in entries])
        numbers = sorted(int(key.partition("/")[2]) for key in entries[0] if key.partition("/")[0] == name)
        return tuple(entry[f"{name}/{i}"] for entry in entries for i in numbers)

    return VisionFeatures(field(POOLED), [field(name) for name in layers] or None)
