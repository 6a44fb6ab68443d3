"""SmolVLM2: batched frames and one position per token; its processor needs the package num2words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vidreason.lightning_modules.vlms.base import VLM


class SmolVLM(VLM):
    """SmolVLM2."""

    vision_modules = ("model.vision_model",)
    casts_pixels = True

    @property
    def unquantised(self) -> tuple[str, ...]:
        """Dotted names of the modules that stay in full precision under ``quantize``, including the connector."""
        return (*self.vision_modules, "model.connector", "lm_head")

    def visual_tokens(self, inputs: Mapping[str, Tensor]) -> int:
        """Returns the number of visual tokens of one prompt, which is the same for every frame."""
        return int(inputs["pixel_values"].shape[1] * self.processor.image_seq_len)

    def join_visual(self, name: str, values: Sequence[Tensor]) -> Tensor:
        """Joins frames [1, T, ...] of unequal T; the model leaves out frames that are all 0."""
        length = max(value.shape[1] for value in values)
        padded = [torch.cat([v, v.new_zeros(1, length - v.shape[1], *v.shape[2:])], dim=1) for v in values]
        return super().join_visual(name, padded)
