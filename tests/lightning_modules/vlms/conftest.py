"""Tiny checkpoints of real families, written once per session."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_builders as others
import hybrid_builders
import pytest
import vlm_builders as builders

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.gemma4 import Gemma4
from vidreason.lightning_modules.vlms.internvl import InternVL
from vidreason.lightning_modules.vlms.llava_onevision import LlavaOnevision
from vidreason.lightning_modules.vlms.qwen import QwenVL
from vidreason.lightning_modules.vlms.qwen3 import GLM4V, Qwen3VL
from vidreason.lightning_modules.vlms.smolvlm import SmolVLM
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM

CLASSES: dict[str, type[VLM]] = {
    "qwen": QwenVL,
    "qwen2": QwenVL,
    "smolvlm": SmolVLM,
    "tiny": TinyVLM,
    "qwen3": Qwen3VL,
    "glm": GLM4V,
    "internvl": InternVL,
    "onevision": LlavaOnevision,
    "nextvideo": LlavaOnevision,
    "glm46": GLM4V,
    "gemma4": Gemma4,
    "qwen3_5": Qwen3VL,
}
FAMILIES = ("qwen", "smolvlm")
HYBRID = {"gemma4": hybrid_builders.write_gemma4, "qwen3_5": hybrid_builders.write_qwen3_5}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "qwen": builders.write_qwen(folder / "qwen"),
        "qwen2": builders.write_qwen(folder / "qwen2", two=True),
        "smolvlm": builders.write_smolvlm(folder / "smolvlm"),
        "tiny": builders.write_tiny(folder / "tiny"),
        "qwen3": others.write_qwen3(folder / "qwen3"),
        "glm": others.write_glm(folder / "glm"),
        "internvl": others.write_internvl(folder / "internvl"),
        "onevision": others.write_llava_onevision(folder / "onevision"),
        "nextvideo": others.write_llava_next_video(folder / "nextvideo"),
        "glm46": others.write_glm(folder / "glm46", newer=True),
    }


@pytest.fixture(scope="session")
def make_vlm(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., VLM]:
    def make(family: str, **options: Any) -> VLM:
        if family not in checkpoints:  # few tests use these
            checkpoints[family] = HYBRID[family](tmp_path_factory.mktemp(family))
        return CLASSES[family](str(checkpoints[family]), **options)

    return make


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name
