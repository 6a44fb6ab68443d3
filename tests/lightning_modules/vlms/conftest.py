"""Tiny checkpoints of real families, each written once per session when a test first needs it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, TIED, WITH_EXPERTS

from vidreason.lightning_modules.vlms.base import VLM


@pytest.fixture(scope="session")
def make_vlm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., VLM]:
    """``make_vlm(family, **options)``: the family on its tiny checkpoint."""
    written: dict[str, Path] = {}

    def make(family: str, **options: Any) -> VLM:
        kind, write = {**FAMILIES, **WITH_EXPERTS, **TIED}[family]
        if family not in written:
            written[family] = write(tmp_path_factory.mktemp("checkpoint") / family)
        return kind(str(written[family]), **options)

    return make


@pytest.fixture(params=("qwen", "smolvlm"))
def family(request: pytest.FixtureRequest) -> str:
    """The name of one of the two families that most tests use."""
    name: str = request.param
    return name


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests of a contract slow, except those that its class names as fast."""
    for item in items:
        fast = getattr(getattr(item, "cls", None), "fast", None)
        if fast is not None and item.name not in fast:
            item.add_marker(pytest.mark.slow)
