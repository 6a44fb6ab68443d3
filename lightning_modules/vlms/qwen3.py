"""Qwen3-VL, Qwen3.5 and GLM-4.1V: a video is a sequence of images with their times as text, in three rotary axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.qwen import repeat_patches
from vidreason.lightning_modules.vlms.rotary import frame_positions


class Qwen3VL(VLM):
    """Qwen3-VL or Qwen3.5, depending on the checkpoint; ``max_pixels`` is the limit of one frame."""

    vision_modules = ("model.visual",)
    casts_pixels = True
    least_pixels = 128 * 32 * 32
    """The processor's least number of pixels of a whole video."""

    def frame_count(self, frames: int) -> int:
        """Returns an even number under ``max_pixels``, since the processor's limit counts pairs, and two for one frame.

        Otherwise all frames go to the processor as they are: how far it shrinks them depends on their number.
        """
        return frames + frames % 2 if self.max_pixels is not None or frames == 1 else frames

    def video_options(self, frames: int = 1) -> dict[str, Any]:
        """Returns the limit of all frames together, which is what the processor takes."""
        options: dict[str, Any] = {"cap_pixels_per_frame": False}
        return options | self._limit(frames)

    def _limit(self, frames: int) -> dict[str, Any]:
        if self.max_pixels is None:
            return {}
        most = self.max_pixels * frames
        return {"size": {"shortest_edge": min(self.least_pixels, most), "longest_edge": most}}

    def position_ids(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns positions [3, B, P]; each pair of frames stands behind the text with its time."""
        visual = inputs["input_ids"] == self._visual_token(model.config)
        mask = inputs["attention_mask"].bool()
        return frame_positions(visual, mask, inputs["video_grid_thw"], model.config.vision_config.spatial_merge_size)

    def text_position_ids(self, positions: Tensor) -> Tensor:
        """Returns positions [3, n, L]; the three axes are equal for text."""
        return positions.expand(3, *positions.shape)

    def repeat_prompts(self, inputs: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        """Returns the inputs of the prompts ``index`` [n]; patches of all videos share one axis."""
        rest = {name: value for name, value in inputs.items() if name != "pixel_values_videos"}
        return {**super().repeat_prompts(rest, index), "pixel_values_videos": repeat_patches(inputs, index)}

    def _visual_token(self, config: Any) -> int:
        return int(config.video_token_id)


class GLM4V(Qwen3VL):
    """GLM-4.1V; ``max_pixels`` is the limit of one frame."""

    end_of_turn = "<|user|>"  # its template leaves the end out: the next turn begins
    least_pixels = 112 * 112

    def video_options(self, frames: int = 1) -> dict[str, Any]:
        """Returns the limit of all frames together, which is what the processor takes."""
        return self._limit(frames)

    def _visual_token(self, config: Any) -> int:
        return int(config.image_token_id)
