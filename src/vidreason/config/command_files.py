"""The YAML files that a command line names: which they are, where they are found and in which order they count."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from jsonargparse import Namespace

from vidreason.config.files import PREFIX, find_config
from vidreason.config.machine import say
from vidreason.config.vlm_shorthand import expand, is_shorthand

_FILE_OPTIONS = ("-c", "--config", "--trainer", "--model", "--data", "--vlm")
_REPLACING = ("--data", "--vlm")


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
    """Yields (index of the option, option, value) of every option that takes a YAML file."""
    for index, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option not in _FILE_OPTIONS:
            continue
        if equals:
            yield index, option, value
        elif index + 1 < len(argv):
            yield index, option, argv[index + 1]


@dataclass(frozen=True)
class OrderedFiles:
    """A command line in the order in which its parts count: stage file, sections, overlays, then all flags."""

    arguments: list[str]
    stage_file: str | None
    """The first ``--config``"""
    replaced: tuple[str, ...]
    """Sections that the command line gives, which replace those of the stage file"""


def order_files(argv: Sequence[str]) -> OrderedFiles:
    """Sorts the files of a command line in front of its flags and finds those that the package ships.

    A later part counts more than an earlier one: stage file (the first ``--config``), sections (``--trainer``,
    ``--model``, ``--data``, ``--vlm``), overlays (the other ``--config``), flags. Of several values of ``--data`` or
    ``--vlm`` the last one counts alone.

    Args:
        argv: Options behind the command, in any order.

    Raises:
        ArgumentError: A hub id or model folder of ``--vlm`` that cannot be read.
    """
    flags = list(argv)
    configs: list[str] = []
    sections: list[str] = []
    replacing: dict[str, str] = {}
    for index, option, value in reversed(list(_file_options(argv))):
        del flags[index : index + (1 if "=" in argv[index] else 2)]
        path = find_config(value)
        if path is not None and path != Path(value):
            say(f"{value}: not in this folder, using the installed package's {path}")
            value = str(path)
        if option in ("-c", "--config"):
            configs.insert(0, value)
        elif option in _REPLACING:
            replacing.setdefault(option, _section_of(value) if option == "--vlm" and is_shorthand(value) else value)
        else:
            sections[:0] = [option, value]
    arguments = ["--config", configs[0]] if configs else []
    arguments += [*sections, *(word for option, value in sorted(replacing.items()) for word in (option, value))]
    arguments += [word for config in configs[1:] for word in ("--config", config)]
    replaced = tuple(option.removeprefix("--") for option in replacing)
    return OrderedFiles([*arguments, *flags], configs[0] if configs else None, replaced)


def given_batch_size(argv: Sequence[str]) -> str | None:
    """Says where a command line sets the batch size of the data module; None where it does not.

    Args:
        argv: Options behind the command.

    Returns:
        ``"the command line"``, or the name of the file that ``--data`` gives.
    """
    if any(word.partition("=")[0] == "--data.init_args.batch_size" for word in argv):
        return "the command line"
    for _, option, value in reversed(list(_file_options(argv))):
        path = find_config(value) if option == "--data" else None
        if path is not None:
            section = yaml.safe_load(path.read_text(encoding="utf-8"))
            named = isinstance(section, dict) and "batch_size" in (section.get("init_args") or {})
            return value if named else None
    return None


def without_sections(content: str, sections: Sequence[str]) -> str:
    """Returns the text of a YAML file without some of its top-level keys; text that is no mapping stays as it is."""
    try:
        loaded = yaml.safe_load(content)
    except yaml.YAMLError:
        return content  # the parser reports it, with file and line
    if not isinstance(loaded, dict) or not set(sections) & set(loaded):
        return content
    return yaml.safe_dump({key: value for key, value in loaded.items() if key not in sections}, sort_keys=False)


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
