"""Properties of model families and built models that scoring behind a shared prefix depends on.

Letters: B prompts, P prompt tokens, n rows, L tokens of a row, A rotary axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, Protocol

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

PER_TOKEN = ("mm_token_type_ids", "token_type_ids")
"""Prompt inputs besides ids and mask with one entry per token; 0 stands for text."""


class PromptLayout(Protocol):
    """The layout of a family's prompts; ``VLM`` implements it."""

    def position_ids(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns positions of left-padded inputs, [B, P], or [A, B, P] for A rotary axes."""

    def text_position_ids(self, positions: Tensor) -> Tensor:
        """Returns text positions [n, L] in the shape that the decoder expects."""

    def repeat_prompts(self, inputs: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        """Returns the inputs of the prompts ``index`` [n], including pixels."""

    def join_visual(self, name: str, values: Sequence[Tensor]) -> Tensor:
        """Joins an input of several prompts that has no entry per token, such as pixels."""


def unwrap(model: Any) -> Any:
    """Returns the transformers ``PreTrainedModel`` inside ``model``, which PEFT may wrap."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(model: nn.Module) -> Any:
    """Returns the configuration of the decoder."""
    return unwrap(model).config.get_text_config()


def cache_keyword(model: nn.Module) -> str:
    """Returns the name of the argument and output for keys and values: ``cache`` from transformers 5.24 on."""
    return "cache" if "cache" in signature(unwrap(model).get_decoder().forward).parameters else "past_key_values"


def would_checkpoint(model: nn.Module) -> bool:
    """Returns whether decoder layers use gradient checkpointing, so that the backward pass recomputes them."""
    return any(
        isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing and layer.training
        for layer in unwrap(model).get_decoder().modules()
    )


def layers_with_state(model: nn.Module) -> str | None:
    """Returns the kind of decoder layers whose cache padding would spoil, or None if all layers have full attention.

    A sliding window keeps the last slots, padding or not, and the state of linear attention takes in every slot.
    """
    config = text_config(model)
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if kinds:
        return f"{kinds[0].replace('_', '-')} layers"
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return "sliding-window layers" if slides else None


def is_sharded(model: nn.Module) -> bool:
    """Returns whether parameters are sharded over ranks by FSDP2, so that every forward gathers them."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def next_positions(positions: Tensor) -> Tensor:
    """Returns positions [B] of the first token behind prompts at ``positions`` [B, P] or [A, B, P]."""
    return positions.reshape(-1, *positions.shape[-2:]).amax(dim=(0, 2)) + 1
