"""``vidreason configs``: lists or copies the YAML files that come with the package."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from vidreason.config import files
from vidreason.config.options import CommandParser


def copy_configs(target: Path) -> list[Path]:
    """Copies the shipped YAML files.

    Args:
        target: Folder to copy them into; made where missing.

    Returns:
        The files written.

    Raises:
        ValueError: A file of that name is already there; nothing is copied then.
    """
    names = files.shipped_files()
    for name in names:
        if (target / name).exists():
            raise ValueError(f"{target / name} exists and would be overwritten: give --copy another folder")
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files.shipped_folder() / name, target / name)
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
    folder = files.shipped_folder()
    width = max((len(name.as_posix()) for name in files.shipped_files()), default=0) + len(files.PREFIX) + 1
    for name in files.shipped_files():
        print(f"{files.PREFIX + '/' + name.as_posix():{width}}  {_first_comment(folder / name)}".rstrip())
    print(f"\nin {folder}; a command finds them as {files.PREFIX}/... from any folder")
    return 0


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""
