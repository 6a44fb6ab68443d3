"""Tiny checkpoints of real families, written once per session."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.qwen import QwenVL
from vidreason.lightning_modules.vlms.smolvlm import SmolVLM
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM

FAMILIES = ("qwen", "smolvlm")


def _load_builders() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vlm_builders", Path(__file__).with_name("builders.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def builders() -> ModuleType:
    return _load_builders()


@pytest.fixture(scope="session")
def checkpoints(builders: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "qwen": builders.write_qwen(folder / "qwen"),
        "qwen2": builders.write_qwen(folder / "qwen2", two=True),
        "smolvlm": builders.write_smolvlm(folder / "smolvlm"),
        "tiny": builders.write_tiny(folder / "tiny"),
    }


@pytest.fixture(scope="session")
def make_vlm(checkpoints: dict[str, Path]) -> Callable[..., VLM]:
    def make(family: str, **options: Any) -> VLM:
        cls = {"smolvlm": SmolVLM, "tiny": TinyVLM}.get(family, QwenVL)
        return cls(str(checkpoints[family]), **options)

    return make


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name
