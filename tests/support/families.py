"""All model families that tests use, each with its class and with the function that writes a tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import family_builders as others
import hybrid_builders as hybrids
import vlm_builders as builders
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5MoeConfig, Qwen3VLMoeConfig

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.gemma4 import Gemma4
from vidreason.lightning_modules.vlms.internvl import InternVL
from vidreason.lightning_modules.vlms.llava_onevision import LlavaOnevision
from vidreason.lightning_modules.vlms.qwen import QwenVL
from vidreason.lightning_modules.vlms.qwen3 import GLM4V, Qwen3VL
from vidreason.lightning_modules.vlms.smolvlm import SmolVLM
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM

FAMILIES: dict[str, tuple[type[VLM], Callable[[Path], Path]]] = {
    "qwen": (QwenVL, builders.write_qwen),
    "qwen2": (QwenVL, partial(builders.write_qwen, two=True)),
    "smolvlm": (SmolVLM, builders.write_smolvlm),
    "tiny": (TinyVLM, builders.write_tiny),
    "qwen3": (Qwen3VL, others.write_qwen3),
    "glm": (GLM4V, others.write_glm),
    "glm46": (GLM4V, partial(others.write_glm, newer=True)),
    "internvl": (InternVL, others.write_internvl),
    "onevision": (LlavaOnevision, others.write_llava_onevision),
    "nextvideo": (LlavaOnevision, others.write_llava_next_video),
    "gemma4": (Gemma4, hybrids.write_gemma4),
    "qwen3_5": (Qwen3VL, hybrids.write_qwen3_5),
}

EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
WITH_EXPERTS: dict[str, tuple[type[VLM], Callable[[Path], Path]]] = {
    "qwen3_moe": (Qwen3VL, partial(others.write_qwen3, config_class=Qwen3VLMoeConfig, **EXPERTS)),
    "internvl_moe": (InternVL, partial(others.write_internvl, model_type="qwen3_moe", head_dim=16, **EXPERTS)),
    "gemma4_moe": (
        Gemma4,
        partial(hybrids.write_gemma4, enable_moe_block=True, moe_intermediate_size=32, num_experts=4, top_k_experts=2),
    ),
    "qwen3_5_moe": (
        Qwen3VL,
        partial(hybrids.write_qwen3_5, config_class=Qwen3_5MoeConfig, shared_expert_intermediate_size=32, **EXPERTS),
    ),
}
"""The same families with a mixture of experts in their decoders."""


def write_tied(write: Callable[[Path], Path], folder: Path) -> Path:
    """A checkpoint whose head is its input embeddings, as in small models on the hub."""
    write(folder)
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


TIED = {
    f"{name}_tied": (FAMILIES[name][0], partial(write_tied, FAMILIES[name][1]))
    for name in ("qwen3", "qwen3_5", "smolvlm")
}
"""Families of which small models have tied heads."""
# With a gain of 1, the naive route's own gradient is 1.7e-5 of its norm away from float64.
TIED["gemma4_tied"] = (Gemma4, partial(write_tied, partial(hybrids.write_gemma4, gain=0.3)))
