"""TinyVLM as a model family: the embedded base, one from scratch, or one from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.tiny.modeling import TinyVLMForConditionalGeneration, scratch_config
from vidreason.lightning_modules.vlms.vision_cache.cache import IN_MEMORY, VisionCacheOptions


def embedded_folder() -> Path:
    """Returns the folder of the base that comes with the package."""
    return Path(str(files("vidreason.lightning_modules.vlms.tiny") / "weights"))


class TinyVLM(VLM):
    """A video VLM of 1.7 M parameters that runs on any CPU; it describes clips of a doorbell camera.

    Args:
        path: ``embedded`` is the base that comes with the package, ``scratch`` the same with random weights (for
            pretraining), anything else a model folder.
        lora: LoRA adapter to train; null trains all weights (full fine-tuning).
        quantize: ``nf4`` holds the base in 4 bits (needs ``lora``).
        freeze_vision: Do not train the vision tower.
        dtype: Dtype of the base's weights.
        attn_implementation: Name of the attention in transformers, for example ``sdpa``.
        gradient_checkpointing: Recompute activations in the backward pass.
        route: How texts share their prompt: ``expand``, ``packed``, ``naive``, or ``auto`` to choose.
        completion_chunk: Texts per forward; null is all of them.
        text_memory_gb: Memory limit in GB for the texts of a forward.
        vision_cache: Where embeddings of a frozen vision path are cached; null disables the cache.
        seed: Seed of the random weights of ``scratch``.
    """

    vision_modules = ("model.visual",)

    def __init__(
        self,
        path: str = "embedded",
        lora: LoRAOptions | None = None,
        quantize: Literal["none", "nf4"] = "none",
        freeze_vision: bool = True,
        dtype: Literal["float32", "bfloat16", "auto"] = "float32",
        attn_implementation: str = "sdpa",
        gradient_checkpointing: bool = False,
        route: Literal["auto", "expand", "packed", "naive"] = "auto",
        completion_chunk: int | None = None,
        text_memory_gb: float | None = None,
        vision_cache: VisionCacheOptions | None = IN_MEMORY,
        seed: int = 0,
    ) -> None:
        self.scratch = path == "scratch"
        self.seed = seed
        folder = str(embedded_folder()) if path in {"embedded", "scratch"} else path
        super().__init__(
            folder,
            lora,
            quantize,
            freeze_vision,
            dtype,
            attn_implementation,
            gradient_checkpointing,
            route=route,
            completion_chunk=completion_chunk,
            text_memory_gb=text_memory_gb,
            vision_cache=vision_cache,
        )

    def visual_tokens(self, inputs: Mapping[str, Tensor]) -> int:
        """Returns the number of visual tokens of one prompt, which is the same for every frame."""
        return int(inputs["pixel_values_videos"].shape[1] * self.processor.tokens_per_frame)

    def build(self, adapter_path: str | None = None) -> nn.Module:
        """Loads the model and attaches ``adapter_path`` or a new adapter; ``scratch`` makes random weights instead."""
        if not self.scratch:
            return super().build(adapter_path)
        if adapter_path is not None or self.lora is not None:
            raise ValueError("vlm.path: scratch is for pretraining; adapters need a trained base")
        tokenizer = self.tokenizer
        # The global generator of torch stays unchanged.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = TinyVLMForConditionalGeneration(
                scratch_config(
                    len(tokenizer),
                    tokenizer.convert_tokens_to_ids("<|video|>"),
                    tokenizer.pad_token_id,
                    tokenizer.eos_token_id,
                )
            )
        model.model.visual.requires_grad_(not self.freeze_vision)
        model.train()
        return model
