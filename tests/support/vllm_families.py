"""Families that vLLM serves, as tiny checkpoints and clips on which its log-probabilities are compared."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import family_builders as others
import hybrid_builders as hybrids
import torch
import vlm_builders as builders
from torch import Tensor

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.gemma4 import Gemma4
from vidreason.lightning_modules.vlms.internvl import InternVL
from vidreason.lightning_modules.vlms.llava_onevision import LlavaOnevision
from vidreason.lightning_modules.vlms.qwen import QwenVL
from vidreason.lightning_modules.vlms.qwen3 import GLM4V, Qwen3VL

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Heads of 64, the smallest that vLLM's attention on the CPU takes."""


class Clip(NamedTuple):
    """Frames of noise from a video: one of ``every`` frames of a video of ``rate`` frames per second."""

    frames: int
    size: tuple[int, int]
    rate: float
    every: int = 1

    @property
    def indices(self) -> tuple[int, ...]:
        """Numbers of the frames in their video."""
        return tuple(range(0, self.frames * self.every, self.every))


CLIPS = (
    Clip(16, (56, 56), 8.0),
    Clip(16, (56, 56), 4.0),
    Clip(16, (56, 56), 1.0),
    Clip(2, (112, 56), 4.0),
    Clip(8, (28, 84), 1.0),
    Clip(11, (140, 84), 29.97, every=13),
)
"""At 4 and 1 frames per second, the times of 16 frames reach beyond a spatial grid of 2 x 2.

Processors with a limit of the whole video shrink the last clip.
"""
SLOW = (*(clip._replace(rate=clip.rate / 4) for clip in CLIPS[:-1]), Clip(11, (140, 84), 30.0, every=15))
"""Pairs of frames begin at whole seconds. GLM-4.6V's processor writes tenths, which vLLM rounds down."""


def qwen_embeddings(model: Any, inputs: Mapping[str, Tensor], clip: Clip) -> dict[str, Any]:
    """The multimodal data of vLLM: the embeddings of a video of Qwen2-VL or Qwen2.5-VL."""
    grids = inputs["video_grid_thw"]
    features = model.model.get_video_features(inputs["pixel_values_videos"], grids)
    times = {name: inputs[name] for name in ("second_per_grid_ts",) if name in inputs}
    return {"video": {"video_embeds": torch.cat(list(features.pooler_output)), "video_grid_thw": grids, **times}}


def qwen3_embeddings(model: Any, inputs: Mapping[str, Tensor], clip: Clip) -> dict[str, Any]:
    """The same for Qwen3-VL or Qwen3.5: embeddings of the layers of DeepStack side by side, with times."""
    grids = inputs["video_grid_thw"]
    features = model.model.get_video_features(inputs["pixel_values_videos"], grids)
    layers = getattr(features, "deepstack_features", None) or ()
    parts = [part if isinstance(part, Tensor) else torch.cat(list(part)) for part in (features.pooler_output, *layers)]
    first, second = clip.indices[::2], (*clip.indices[1::2], clip.indices[-1])  # the last frame may pair with itself
    times = [(one + other) / 2 / clip.rate for one, other in zip(first, second, strict=False)]
    return {"video": {"video_embeds": torch.cat(parts, dim=-1), "video_grid_thw": grids, "timestamps": [times]}}


def internvl_embeddings(model: Any, inputs: Mapping[str, Tensor], clip: Clip) -> dict[str, Any]:
    """The same for InternVL, of whose videos vLLM takes no embeddings: those of the frames, as images."""
    settings = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
    return {
        "image": list(model.model.get_image_features(pixel_values=inputs["pixel_values"], **settings).pooler_output)
    }


def llava_embeddings(model: Any, inputs: Mapping[str, Tensor], clip: Clip) -> dict[str, Any]:
    """The same for LLaVA-OneVision, of whose videos vLLM takes no embeddings: those of a video as one image."""
    settings = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    return {"image": list(model.model.get_video_features(inputs["pixel_values_videos"], **settings).pooler_output)}


class Family(NamedTuple):
    """A model family with what differs between families in these tests."""

    vlm: type[VLM]
    write: Callable[..., Path]
    sizes: Mapping[str, Any]
    embeddings: Callable[[Any, Mapping[str, Tensor], Clip], dict[str, Any]] | None = None
    """Returns the embeddings of a video as the multimodal data of vLLM; None if it takes pixels only."""
    dtype: str = "float32"
    adapter: bool = True
    """True if vLLM takes LoRA adapters of this family."""
    clips: tuple[Clip, ...] = CLIPS


MROPE = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0}
INTERLEAVED = {**MROPE, "mrope_section": [12, 10, 10], "mrope_interleaved": True}
WHOLE = {**MROPE, "partial_rotary_factor": 1.0}
HALF = {**INTERLEAVED, "mrope_section": [6, 5, 5], "partial_rotary_factor": 0.5}
SMALL_GEMMA = {"head_dim": 64, "global_head_dim": 128, "gain": 0.1, "use_bidirectional_attention": None}
"""As in E2B and E4B. In larger models visual tokens see each other, which vLLM's attention on the CPU leaves out.

With a gain of 1, products of normed queries and keys reach 64, and rounding in float32 moves log-probs by 5e-4.
"""
FAMILIES = {
    "Qwen2.5-VL": Family(QwenVL, builders.write_qwen, {"rope_parameters": MROPE}, qwen_embeddings),
    "Qwen2-VL": Family(QwenVL, builders.write_qwen, {"rope_parameters": MROPE, "two": True}, qwen_embeddings),
    "Qwen3-VL": Family(Qwen3VL, others.write_qwen3, {"head_dim": 64, "rope_parameters": INTERLEAVED}, qwen3_embeddings),
    "GLM-4.1V": Family(GLM4V, others.write_glm, {"rope_parameters": WHOLE}),
    "GLM-4.6V": Family(GLM4V, others.write_glm, {"rope_parameters": WHOLE, "newer": True, "flash": True}, clips=SLOW),
    "InternVL3": Family(InternVL, others.write_internvl, {}, internvl_embeddings),
    "InternVL3.5": Family(
        InternVL, others.write_internvl, {"model_type": "qwen3", "head_dim": 64}, internvl_embeddings
    ),
    "LLaVA-OneVision": Family(
        LlavaOnevision, others.write_llava_onevision, {"image": 70}, llava_embeddings, adapter=False
    ),
    "LLaVA-NeXT-Video": Family(LlavaOnevision, others.write_llava_next_video, {"image": 32, "patch": 4}),
    "Gemma 4": Family(Gemma4, hybrids.write_gemma4, SMALL_GEMMA),
    "Qwen3.5, full attention": Family(
        Qwen3VL,
        hybrids.write_qwen3_5,
        {"head_dim": 64, "rope_parameters": HALF, "layer_types": ["full_attention"] * 3},
        qwen3_embeddings,
    ),
    "Qwen3.5": Family(
        Qwen3VL,
        hybrids.write_qwen3_5,
        {"head_dim": 64, "rope_parameters": HALF, "linear_key_head_dim": 128, "linear_value_head_dim": 128},
        qwen3_embeddings,
        "bfloat16",
    ),
}
