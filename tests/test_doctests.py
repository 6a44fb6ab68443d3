"""Examples in docstrings are run, each module under its own name (a bare ``rewards.base`` would be a second one)."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "vidreason": ROOT / "src" / "vidreason",
    **{
        f"vidreason.{name}": ROOT / name
        for name in ("rewards", "datamodules", "lightning_modules", "callbacks", "configs")
    },
}


def module_name(package: str, folder: Path, path: Path) -> str:
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join([package, *(part for part in parts if part != "__init__")])


WITH_EXAMPLES = sorted(
    module_name(package, folder, path)
    for package, folder in FOLDERS.items()
    for path in folder.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def test_examples_are_found():
    assert "vidreason" in WITH_EXAMPLES


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_hold(name):
    result = doctest.testmod(import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0
