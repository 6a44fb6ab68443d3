"""The cache of a decoder, which holds the prompts (and texts) behind which further texts are forwarded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from vidreason.lightning_modules.vlms.prefix.layout import text_config, unwrap, would_checkpoint
from vidreason.lightning_modules.vlms.prefix.recompute import RecomputedCache


class LinearState(LinearAttentionLayer):
    """The convolution and recurrent states of a layer with linear attention, in tensors that are never written to.

    The layer of transformers copies each new state into the old one, which the backward pass of earlier tokens needs,
    and it cannot select rows. Here every change makes new dicts of new tensors, so that shallow copies are independent.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Layers that are told so do not call the kernel for one token, which writes to the convolution state.
        self.record_past = True

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Returns the inputs [n, C, W] of the convolution behind the last ones before them."""
        assert conv_kernel_size is not None, "the layer does not say how many inputs its convolution needs"
        before = self.conv_states[state_idx]
        full = conv_states if before is None else torch.cat([before, conv_states], dim=-1)
        # A slice alone would keep the memory of all inputs.
        self.conv_states = {**self.conv_states, state_idx: full[..., -conv_kernel_size:].clone()}
        self.has_previous_state = {**self.has_previous_state, state_idx: True}
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Replaces the recurrent state [n, ...] and returns it."""
        self.recurrent_states = {**self.recurrent_states, state_idx: recurrent_states}
        return recurrent_states

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows ``indices``, which may repeat."""
        self.conv_states = _rows(self.conv_states, indices)
        self.recurrent_states = _rows(self.recurrent_states, indices)


def _rows(states: dict[int, Tensor | None], indices: Tensor) -> dict[int, Tensor | None]:
    return {key: None if state is None else state[indices] for key, state in states.items()}


class ReservedLayer(DynamicLayer):
    """Keys and values of n rows of a layer with full attention, in storage with room for all tokens to come.

    A step writes its token in place, and rows that leave make room for others; nothing else is copied. It has no
    gradient. K key heads, S tokens, D head size.

    Args:
        layer: The layer that is continued: [m, K, S, D]; it is not changed.
        rows: [n] int64, its rows, which may repeat.
        room: Number of tokens to come.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer, rows: Tensor, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        assert layer.keys is not None
        assert layer.values is not None
        self.device, self.is_initialized = layer.keys.device, True
        self._stores = [_reserved(states, rows, room) for states in (layer.keys, layer.values)]
        self._rows, self._tokens = len(rows), layer.keys.shape[2]
        self._shown()

    def _shown(self) -> tuple[Tensor, Tensor]:
        """Returns keys and values of the tokens and rows so far, and sets what transformers reads."""
        keys, values = (store[: self._rows, :, : self._tokens] for store in self._stores)
        self.keys, self.values = keys, values
        return keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes keys and values [n, K, W, D] of new tokens, and returns those of all tokens."""
        before = self._tokens
        self._tokens += key_states.shape[2]
        keys, values = self._shown()
        keys[:, :, before:] = key_states
        values[:, :, before:] = value_states
        return keys, values

    def move(self, source: Tensor, target: Tensor, rows: int) -> None:
        """Copies the rows ``source`` to ``target``, [k] int64 each, and keeps the first ``rows`` rows."""
        for states in self._shown():
            states[target] = states[source]
        self._rows = rows
        self._shown()


class PaddedCache(Cache):
    """A cache of padded rows, for whose next tokens transformers makes a mask without asking the device for padding."""

    is_compileable = True


def _reserved(states: Tensor, rows: Tensor, room: int) -> Tensor:
    """Returns storage [n, K, S + room, D] that begins with the rows ``rows`` of ``states`` [m, K, S, D]."""
    _, heads, tokens, size = states.shape
    store = states.new_empty(len(rows), heads, tokens + room, size)
    store[:, :, :tokens] = states[rows]
    return store


def new_cache(model: nn.Module) -> DynamicCache:
    """Returns an empty cache for the decoder of ``model``, which layers under gradient checkpointing may extend.

    Raises:
        ValueError: If every layer has linear attention.
    """
    config = text_config(model)
    kinds = getattr(config, "layer_types", None)
    if kinds and set(kinds) == {"linear_attention"}:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has linear attention in every layer: the cache of transformers takes its "
            "length from a layer with full attention; vlm.route: naive scores texts without one, and nothing generates"
        )
    cache = (RecomputedCache if would_checkpoint(model) else DynamicCache)(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is LinearAttentionLayer:
            cache.layers[index] = LinearState(number_of_states=layer.number_of_states)
    return cache
