"""Resolves the paths in a table to files."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from vidreason.datamodules.clips.time_limit import LOOK_TIMEOUT, call_for_files
from vidreason.datamodules.sources.folders import PICTURE_SUFFIXES, VIDEO_SUFFIXES

_SAMPLE = 200  # rows that the guess of a root looks for


def path_of(value: str) -> str:
    """Returns the path in a cell: its text, or the only element of a JSON list."""
    if value.startswith("["):
        try:
            items = json.loads(value)
        except json.JSONDecodeError:
            return value
        if isinstance(items, list) and len(items) == 1 and isinstance(items[0], str):
            return items[0]
    return value


def spellings(value: str) -> list[str]:
    """Returns the ways to read a path of a table: as it is, in other Unicode forms, with backslashes as separators."""
    if value.isascii() and "\\" not in value:
        return [value]
    forms = [value, unicodedata.normalize("NFC", value), unicodedata.normalize("NFD", value)]
    return list(dict.fromkeys([*forms, *(form.replace("\\", "/") for form in forms)]))


def on_windows_drive(value: str) -> bool:
    r"""Returns whether a path is absolute on Windows, such as ``C:\\clips\\a.mp4``."""
    return re.match(r"[A-Za-z]:[\\/]|\\\\", value) is not None


def locator(table: Path, values: Sequence[str], root: Path | None) -> tuple[Callable[[str], Path], list[str]]:
    """Finds the root folder of a table's paths, and the suffix of those without one.

    Args:
        table: The table's file.
        values: The cells of its path column.
        root: Folder that paths are relative to; None tries the table's folder and the current folder.

    Returns:
        The function from a path to its file, which may be missing; and one sentence about each guess.

    Raises:
        ValueError: If none of the files exists.
    """
    roots = [root] if root is not None else list(dict.fromkeys([absolute(table.parent), Path.cwd()]))
    sample = [path_of(value) for value in values]
    for some in (sample[:_SAMPLE], sample):
        hits = [len(_find_all(absolute(folder), some)) for folder in roots]
        if max(hits):
            break
    else:
        places = " and ".join(str(absolute(folder) / sample[0]) for folder in roots)
        raise ValueError(
            f"{table}: path not found: {sample[0]!r} of the first row, looked for {places}; "
            + ("make the paths, which are of a Windows drive, relative and " * on_windows_drive(sample[0]))
            + "give --root DIR"
        )
    best = absolute(roots[hits.index(max(hits))])
    notes = [f"paths are relative to {best}"] if len(roots) > 1 and best != absolute(table.parent) else []
    found = _find_all(best, sample)
    return lambda value: found.get(value) or absolute(best / value), notes


def _find_all(root: Path, values: Sequence[str]) -> dict[str, Path]:
    """Returns the files of those paths that have one.

    Raises:
        ReadTimeoutError: If the file system does not answer.
    """
    wanted = list(dict.fromkeys(values))
    files = call_for_files(partial(_find, root), wanted, LOOK_TIMEOUT)
    return {value: file for value, file in zip(wanted, files, strict=True) if file is not None}


def _find(root: Path, value: str) -> Path | None:
    """Returns the file of a path, in either Unicode normal form, with a video suffix added if it has none."""
    for text in spellings(value):
        path = root / text
        if _may_be_clip(path):
            return absolute(path)
        if not path.suffix:
            for suffix in sorted(VIDEO_SUFFIXES):
                if (found := path.with_name(path.name + suffix)).is_file():
                    return absolute(found)
    return None


def _may_be_clip(path: Path) -> bool:
    """Returns whether there is a file (also a pipe, which is reported when it is read) or a folder of pictures."""
    if path.is_dir():
        return any(file.suffix.lower() in PICTURE_SUFFIXES for file in path.iterdir())
    return path.exists()


def absolute(path: Path) -> Path:
    """Returns the absolute path without resolving links, unless it contains ``..``."""
    return path.resolve() if ".." in path.parts else path.absolute()
