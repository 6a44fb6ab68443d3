"""Gemma 4: frames of all videos along one axis, sliding windows, and layers that share keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading import building


class Gemma4(VLM):
    """Gemma 4; its processor gives every frame about the same number of tokens."""

    @cached_property
    def vision_modules(self) -> tuple[str, ...]:
        """Dotted names of the vision tower and, in the smaller models, of what encodes sound."""
        with building.readable(self.path):
            config = AutoConfig.from_pretrained(self.path)
        sound = () if config.audio_config is None else ("model.audio_tower", "model.embed_audio")
        return ("model.vision_tower", *sound)

    @property
    def unquantised(self) -> tuple[str, ...]:
        """Dotted names of the modules that stay in full precision under ``quantize``, including the projector."""
        return (*super().unquantised, "model.embed_vision")

    def build(self, adapter_path: str | None = None) -> nn.Module:
        """Loads the base and attaches an adapter, as in other families.

        Raises:
            ValueError: Also if transformers is too old to run the model on videos.
        """
        # Before, its forward does not tell the vision tower how many frames belong to which video.
        if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
            raise ValueError(
                f"transformers {transformers.__version__} cannot run Gemma 4 on videos: install 5.23 or newer"
            )
        return super().build(adapter_path)

    def visual_tokens(self, inputs: Mapping[str, Tensor]) -> int:
        """Returns the number of visual tokens of one prompt: its patches without padding, pooled in squares."""
        patches = int((inputs["video_position_ids"] >= 0).all(-1).sum())
        return patches // int(self.processor.video_processor.pooling_kernel_size) ** 2

    def repeat_prompts(self, inputs: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        """Returns the inputs of the prompts ``index`` [n]; frames of all videos share one axis."""
        frames = inputs["num_frames_per_video"].tolist()
        of_frames = [name for name in ("pixel_values_videos", "video_position_ids") if name in inputs]
        rest = {name: value for name, value in inputs.items() if name not in of_frames}
        videos = {name: inputs[name].split(frames) for name in of_frames}
        return {
            **super().repeat_prompts(rest, index),
            **{name: torch.cat([pieces[i] for i in index.tolist()]) for name, pieces in videos.items()},
        }
