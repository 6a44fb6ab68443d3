"""Qwen2.5-VL and Qwen2-VL: flattened patches with a grid per video, and three rotary axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.rotary import video_positions


class QwenVL(VLM):
    """Qwen2.5-VL or Qwen2-VL, depending on the checkpoint; ``max_pixels`` is the limit of one frame."""

    vision_modules = ("model.visual",)
    casts_pixels = True
    note = (
        "generate() of transformers 5.19 to 5.24 gives text behind a video other positions than those that the weights "
        "were trained with, which vLLM gives it: docs/models.md"
    )
    _reported = False

    def video_options(self, frames: int = 1) -> dict[str, Any]:
        """Returns the pixel limits of a frame and disables the processor's limit over the whole video."""
        options: dict[str, Any] = {"cap_pixels_per_frame": False}
        if self.max_pixels is not None:
            least = min(128 * 28 * 28, self.max_pixels)  # the processor's minimum: 128 visual tokens of 28 x 28 pixels
            options["size"] = {"shortest_edge": least, "longest_edge": self.max_pixels}
        return options

    def position_ids(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns positions [3, B, P] of time, height and width (M-RoPE); text continues after the largest of them."""
        if "video_grid_thw" not in inputs:  # prompts of text alone, as benchmarks use
            return self.text_position_ids(super().position_ids(model, inputs))
        vision, grids = model.config.vision_config, inputs["video_grid_thw"]
        # Qwen2-VL has no such rate: its positions count steps, not seconds.
        rate: float | None = getattr(vision, "tokens_per_second", None)
        seconds = None
        if rate is not None:
            seconds = inputs["second_per_grid_ts"].float()
            self._report_shared_times(seconds * rate, grids[:, 0])
        video = inputs["input_ids"] == model.config.video_token_id
        mask = inputs["attention_mask"].bool()
        return video_positions(video, mask, grids, vision.spatial_merge_size, seconds, rate or 1)

    def _report_shared_times(self, positions_per_step: Tensor, steps: Tensor) -> None:
        if self._reported or not bool(((positions_per_step < 1) & (steps > 1)).any()):
            return
        self._reported = True
        rank_zero_info(
            "frames of some clips are so close in time that several share a position, as in the training of this "
            "model; sampling at fewer frames per second avoids it"
        )

    def text_position_ids(self, positions: Tensor) -> Tensor:
        """Returns positions [3, n, L]; the three axes are equal for text."""
        return positions.expand(3, *positions.shape)

    def repeat_prompts(self, inputs: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        """Returns the inputs of the prompts ``index`` [n]; patches of all videos share one axis, split by the grids."""
        rest = {name: value for name, value in inputs.items() if name != "pixel_values_videos"}
        return {**super().repeat_prompts(rest, index), "pixel_values_videos": repeat_patches(inputs, index)}


def repeat_patches(inputs: Mapping[str, Tensor], index: Tensor) -> Tensor:
    """Returns the patches of the videos ``index`` [n], which share one axis, split by the grids of all videos."""
    videos = torch.split(inputs["pixel_values_videos"], inputs["video_grid_thw"].prod(-1).tolist())
    return torch.cat([videos[i] for i in index.tolist()])
