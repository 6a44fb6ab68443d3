"""Gradient checkpointing of decoder layers that read and extend a cache.

transformers drops the cache of a layer that checkpoints, since the layer would extend it a second time when it is
recomputed. Here each layer is a function of its hidden states and its part of the cache, and returns that part anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import Cache

from vidreason.lightning_modules.vlms.prefix.layout import unwrap


class RecomputedCache(DynamicCache):
    """A cache whose selection of rows is part of what layers recompute, so that selected rows are not kept."""

    rows: Tensor | None = None
    """[n] int64, rows of the stored states that the next forward continues; None stands for all."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Selects rows for the next forward."""
        self.rows = indices if self.rows is None else self.rows[indices]


@contextmanager
def recomputed_layers(model: nn.Module, cache: Cache) -> Iterator[None]:
    """Makes decoder layers in the block recomputable, if ``cache``, which they extend, is a ``RecomputedCache``."""
    if not isinstance(cache, RecomputedCache):
        yield
        return
    decoder = unwrap(model).get_decoder()
    with ExitStack() as stack:
        for index, layer in enumerate(decoder.layers):
            stack.enter_context(_replaced(layer, "forward", partial(_recomputed, layer, layer.forward, index)))
        for module in decoder.modules():
            if getattr(module, "gradient_checkpointing", False):
                stack.enter_context(_replaced(module, "gradient_checkpointing", False))
        yield
    cache.rows = None


def _recomputed(
    layer: nn.Module, forward: Callable[..., Any], index: int, hidden: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Runs ``forward`` of layer ``index`` under checkpointing, and puts its new part into the cache."""
    name = next(key for key, value in kwargs.items() if isinstance(value, RecomputedCache))
    cache: RecomputedCache = kwargs.pop(name)
    # Keys and values that later layers share are written to a mapping, which is then part of the state too.
    shared = {key: kwargs.pop(key) for key, value in tuple(kwargs.items()) if isinstance(value, MutableMapping)}
    # What the function keeps must not hold its own results, or the graph would never be freed.
    part: Any = cache.layers[index]
    rows, before = cache.rows, {key: copy.copy(value) for key, value in shared.items()}

    def run(hidden: Tensor, *args: Any) -> tuple[Any, Any, dict[str, Any]]:
        own, after = copy.copy(part), {key: copy.copy(value) for key, value in before.items()}
        if rows is not None:
            own.batch_select_indices(rows)
        state = {name: Cache(layers=[own] * (index + 1)), **after}
        # The backward pass runs this after the block has ended.
        with _replaced(layer, "gradient_checkpointing", False):
            return forward(hidden, *args, **kwargs, **state), own, after

    out, cache.layers[index], after = checkpoint(run, hidden, *args, use_reentrant=False)
    for key, value in after.items():
        shared[key].update(value)
    return out


@contextmanager
def _replaced(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """Sets an attribute of ``module`` itself in the block, not of its class."""
    own = vars(module)
    before = {name: own[name]} if name in own else {}
    own[name] = value
    try:
        yield
    finally:
        del own[name]
        own.update(before)
