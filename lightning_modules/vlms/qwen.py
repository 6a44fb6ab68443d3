"""Qwen2.5-VL and Qwen2-VL: flattened patches with a grid per video, and three rotary axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vidreason.lightning_modules.vlms.base import VLM


class QwenVL(VLM):
    """Qwen2.5-VL or Qwen2-VL, by the checkpoint at ``path``; ``max_pixels`` is per frame."""

    vision_modules = ("model.visual",)

    def video_options(self) -> dict[str, Any]:
        """Returns the pixel budget per frame; the processor's budget over the whole video is switched off."""
        options: dict[str, Any] = {"cap_pixels_per_frame": False}
        if self.max_pixels is not None:
            least = min(128 * 28 * 28, self.max_pixels)
            options["size"] = {"shortest_edge": least, "longest_edge": self.max_pixels}
        return options

    def position_ids(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns [3, B, P]: time, height and width of visual tokens; text continues after the largest of them."""
        names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts", "attention_mask")
        positions: Tensor = model.model.get_rope_index(**{name: inputs[name] for name in names if name in inputs})[0]
        return positions

    def text_position_ids(self, positions: Tensor) -> Tensor:
        """Returns [3, n, L]; the three axes are equal on text."""
        return positions.expand(3, *positions.shape)

    def repeat_prompts(self, inputs: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        """Returns the inputs of the prompts ``index``; patches of all videos share one axis, which the grids divide."""
        patches, grid = inputs["pixel_values_videos"], inputs["video_grid_thw"]
        videos = torch.split(patches, grid.prod(-1).tolist())
        rest = {name: value for name, value in inputs.items() if name != "pixel_values_videos"}
        return {
            **super().repeat_prompts(rest, index),
            "pixel_values_videos": torch.cat([videos[i] for i in index.tolist()]),
        }
