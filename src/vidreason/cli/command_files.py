"""The YAML files that a command line names: which they are, and where they lie."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from jsonargparse import Namespace

from vidreason.cli.configs import PREFIX, find_config
from vidreason.cli.processes import say
from vidreason.cli.vlm_shorthand import expand, is_shorthand

_FILE_OPTIONS = ("-c", "--config", "--trainer", "--model", "--data", "--vlm")


def config_files(argv: Sequence[str]) -> list[Path]:
    """Returns the YAML files of a command line and, behind each, the files it names."""
    found: list[Path] = []
    waiting = [path for _, _, value in _file_options(argv) if (path := find_config(value)) is not None]
    while waiting:
        path = waiting.pop(0)
        found.append(path)
        for name in re.findall(r"""[:\[\s,]['"]?([\w./-]+\.ya?ml)\b""", path.read_text(encoding="utf-8")):
            section = path.parent / name
            if section.is_file() and section not in found + waiting:
                waiting.append(section)
    return found


def _file_options(argv: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Yields (index of the word that holds the value, text in front of the value, value) of every YAML option."""
    for index, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option not in _FILE_OPTIONS:
            continue
        if equals:
            yield index, option + "=", value
        elif index + 1 < len(argv):
            yield index + 1, "", argv[index + 1]


def with_shipped_files(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Replaces ``configs/...`` that are not in the current folder by the package's; also returns the first config."""
    arguments = list(argv)
    first_config = None
    for index, front, value in _file_options(argv):
        path = find_config(value)
        if path is not None and path != Path(value):
            say(f"{value}: not in this folder, using the installed package's {path}")
            arguments[index] = f"{front}{path}"
        option = front.rstrip("=") or argv[index - 1]
        if option == "--vlm" and is_shorthand(value):
            arguments[index] = f"{front}{_section_of(value)}"
        if option in ("-c", "--config") and first_config is None:
            first_config = value
    return arguments, first_config


def _section_of(value: str) -> str:
    """The section that a hub id or model folder stands for, as the parser takes it."""
    try:
        return json.dumps(expand(value))
    except ValueError as error:
        raise argparse.ArgumentError(None, str(error)) from error


def point_at_shipped(section: Namespace | None) -> None:
    """Resolves values such as ``task: configs/tasks/porch.yaml`` in place where only the package has the file."""
    if section is None:
        return
    for key, value in section.items():
        if isinstance(value, str) and value.startswith(f"{PREFIX}/") and value.endswith((".yaml", ".yml")):
            section[key] = str(find_config(value) or value)
