"""InternVL3 and InternVL3.5 (checkpoints whose names end in -hf): frames as images, and one position per token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vidreason.lightning_modules.vlms.base import VLM


class InternVL(VLM):
    """InternVL3 or InternVL3.5."""

    vision_modules = ("model.vision_tower",)
    casts_pixels = True

    @property
    def unquantised(self) -> tuple[str, ...]:
        """Dotted names of the modules that stay in full precision under ``quantize``, including the projector."""
        return (*self.vision_modules, "model.multi_modal_projector", "lm_head")

    def visual_tokens(self, inputs: Mapping[str, Tensor]) -> int:
        """Returns the number of visual tokens of one prompt, which is the same for every frame."""
        return int(len(inputs["pixel_values"]) * self.processor.image_seq_length)

    def repeat_prompts(self, inputs: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        """Returns the inputs of the prompts ``index`` [n]; frames of all prompts share one axis."""
        tokens = (inputs["input_ids"] == self.processor.image_token_id).sum(-1)
        frames = inputs["pixel_values"].split((tokens // self.processor.image_seq_length).tolist())
        rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
        return {
            **super().repeat_prompts(rest, index),
            "pixel_values": torch.cat([frames[i] for i in index.tolist()]),
        }
