"""The cache of a decoder, which holds the prompts (and texts) behind which further texts are forwarded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

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
