"""``vidreason configs``: the YAML files that come with the package, and how a command finds them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from vidreason.config.options import CommandParser

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
    """Looks a YAML file up: in the current folder first, then among the shipped ones.

    Args:
        name: Path as the user or another YAML writes it. Only a relative ``configs/...`` is looked up in the package.

    Returns:
        The file, or None where there is none.
    """
    here = Path(name)
    if here.is_file():
        return here
    if here.parts[:1] == (PREFIX,) and ".." not in here.parts:
        shipped = shipped_folder().joinpath(*here.parts[1:])
        if shipped.is_file():
            return shipped
    return None


def copy_configs(target: Path) -> list[Path]:
    """Copies the shipped YAML files.

    Args:
        target: Folder to copy them into; made where missing.

    Returns:
        The files written.

    Raises:
        ValueError: A file of that name is already there; nothing is copied then.
    """
    names = shipped_files()
    for name in names:
        if (target / name).exists():
            raise ValueError(f"{target / name} exists and would be overwritten: give --copy another folder")
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shipped_folder() / name, target / name)
    return [target / name for name in names]


def main(argv: Sequence[str]) -> int:
    """Lists or copies the shipped YAML files.

    Args:
        argv: Options of ``vidreason configs``.

    Returns:
        Exit status.
    """
    parser = CommandParser(prog="vidreason configs", description="List or copy the shipped YAML files.")
    parser.add_argument("--copy", metavar="DIR", type=Path, help="copy them into this folder, to be changed there")
    options = parser.parse_options(argv)
    if options.copy is not None:
        written = copy_configs(options.copy)
        print(f"{len(written)} files written to {options.copy}")
        return 0
    folder = shipped_folder()
    width = max((len(name.as_posix()) for name in shipped_files()), default=0) + len(PREFIX) + 1
    for name in shipped_files():
        print(f"{PREFIX + '/' + name.as_posix():{width}}  {_first_comment(folder / name)}".rstrip())
    print(f"\nin {folder}; a command finds them as {PREFIX}/... from any folder")
    return 0


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""
