"""The YAML files that the package ships, and how a command finds them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

PREFIX = "configs"


def shipped_folder() -> Path:
    """Returns the folder of the installed package's YAML files."""
    return Path(str(files("vidreason.configs")))


def shipped_files() -> list[Path]:
    """Returns every shipped YAML file relative to :func:`shipped_folder`, stage files before the sections."""
    folder = shipped_folder()
    found = [path.relative_to(folder) for path in folder.rglob("*.yaml")]
    return sorted(found, key=lambda path: (len(path.parts), path.as_posix()))


def find_config(name: str) -> Path | None:
    """Finds a YAML file in the current folder or, failing that, among the shipped files.

    Args:
        name: Path as the user or another YAML writes it. Only a relative ``configs/...`` is searched in the package.

    Returns:
        The path of the file, or None if there is none.
    """
    here = Path(name)
    if here.is_file():
        return here
    if here.parts[:1] == (PREFIX,) and ".." not in here.parts:
        shipped = shipped_folder().joinpath(*here.parts[1:])
        if shipped.is_file():
            return shipped
    return None
