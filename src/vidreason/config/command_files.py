"""The YAML files that a command line names: how they are found, and in which order they apply."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from vidreason.config.files import PREFIX, find_config
from vidreason.config.machine import say
from vidreason.config.vlm_shorthand import expand, is_shorthand
from vidreason.datamodules.task import explain_yaml_error

_FILE_OPTIONS = ("-c", "--config", "--trainer", "--model", "--data", "--vlm")
_REPLACING = ("--data", "--vlm")
_SECTION = "a section file (.yaml with class_path and init_args) is"
PIPELINE_CONFIG = "pipeline --config"
"""``--config`` of ``vidreason pipeline``, for ``check_section``."""
_EXPECTED = {"--trainer": "a file with arguments of the trainer (max_epochs: 3) is"}
_EXPECTED |= dict.fromkeys(("-c", "--config"), "a file of keys and values (trainer: ...) is")
_EXPECTED[PIPELINE_CONFIG] = "a pipeline (stages: ...) is"
_NEEDED = {"--model": ("class_path", "init_args"), "--data": ("class_path",), "--vlm": ("class_path",)}
"""Keys of which a section file has one at least."""
_TELLING = {"manifest": "--data", "path": "--vlm", "optim": "--model"}
"""Arguments that tell which section a file holds."""
YAML_SUFFIXES = (".yaml", ".yml")
_TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl")


def config_files(argv: Sequence[str]) -> list[Path]:
    """Returns the YAML files of a command line and, recursively, the files that they name.

    Raises:
        ArgumentError: If one is not valid YAML.
    """
    found: list[Path] = []
    waiting = [path for _, _, value in _file_options(argv) if (path := find_config(value)) is not None]
    while waiting:
        path = waiting.pop(0)
        found.append(path)
        check_yaml(path)
        # a file name as a YAML value: after a colon, a space, a bracket or a comma, quoted or not
        for name in re.findall(r"""[:\[\s,]['"]?([\w./-]+\.ya?ml)\b""", path.read_text(encoding="utf-8")):
            section = path.parent / name
            if section.is_file() and section not in found + waiting:  # files may name each other
                waiting.append(section)
    return found


def check_yaml(path: Path) -> None:
    """Checks that a file is YAML, since the parser would report a mistake in it in other words.

    Raises:
        ArgumentError: If it is not; the message has line and column.
    """
    if path.suffix not in YAML_SUFFIXES:
        return
    try:
        parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise argparse.ArgumentError(None, explain_yaml_error(path, error)) from error


def check_section(option: str, value: str) -> None:
    """Checks that the value of an option that takes a YAML file is a file with what the option needs.

    Raises:
        ArgumentError: If it is another file or a folder; the message names what was expected.
    """
    path = Path(value)
    wanted = f"{option.split()[-1]} {value}: {_EXPECTED.get(option, _SECTION)} expected, not "
    init = f"; `vidreason init {{}} --out task` writes one: {option} task/data.yaml" * (option == "--data")
    if "\\" in value and not path.exists():
        raise argparse.ArgumentError(
            None, f"{option} {value}: no such file; folders are separated by / here, not by \\"
        )
    if path.suffix in YAML_SUFFIXES and not path.is_dir():
        if (file := find_config(value)) is None:
            raise argparse.ArgumentError(None, f"no such file: {value} (`vidreason configs` lists the shipped ones)")
        check_yaml(file)
        if what := _not_expected(option, value, parse_yaml(file.read_text(encoding="utf-8"))):
            raise argparse.ArgumentError(None, wanted + what + init.format("CLIPS"))
        return
    if option == "--vlm" or not path.exists():
        return
    if path.is_dir() or path.suffix.lower() in _TABLE_SUFFIXES:
        what = "a folder" if path.is_dir() else "a table"
        raise argparse.ArgumentError(None, wanted + what + init.format(value))


def _not_expected(option: str, value: str, content: object) -> str:
    """Returns what a YAML file has on top, in words, if it is not what an option takes; else an empty text."""
    if not isinstance(content, dict) or not content:
        return "an empty file" if not content else f"a {'list' if isinstance(content, list) else 'single value'}"
    needed = _NEEDED.get(option, ())
    if any(key in content for key in needed):
        return ""
    if what := _other_kind(option, value, content):
        return what
    return f"one with {', '.join(str(key) for key in [*content][:5])}" if needed else ""


def _other_kind(option: str, value: str, content: Mapping[str, object]) -> str:
    """Returns which other kind of file of vidreason a mapping looks like, and its option; else an empty text."""
    if "classes" in content:
        return f"a task file; name it in the data section: --data.init_args.task {value}"
    if "stages" in content and option == PIPELINE_CONFIG:
        return ""
    if "stages" in content:
        return f"a pipeline; it is run by: vidreason pipeline --config {value}"
    if "class_path" in content:
        arguments = content.get("init_args")
        given = arguments if isinstance(arguments, dict) else {}
        own = next((own for key, own in _TELLING.items() if key in given), "--data, --vlm or --model")
        return f"a section with class_path; give it as {own}"
    if option not in ("-c", "--config") and {"trainer", "model"} & set(content):
        how = "it is run by: vidreason fit" if option == PIPELINE_CONFIG else "give it as"
        return f"a file of several sections; {how} --config {value}"
    return ""


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
    """A command line in the order in which its parts apply: stage file, sections, overlays, then all flags."""

    arguments: list[str]
    stage_file: str | None
    """The first ``--config``."""
    replaced: tuple[str, ...]
    """Sections that the command line gives; they replace those of the stage file."""


def order_files(argv: Sequence[str]) -> OrderedFiles:
    """Moves the files of a command line before its flags and resolves those that the package ships.

    A later part overrides an earlier one: stage file (the first ``--config``), sections (``--trainer``, ``--model``,
    ``--data``, ``--vlm``), overlays (the other ``--config``), flags. Of several values of ``--data`` or ``--vlm`` only
    the last one is used.

    Args:
        argv: Options after the command, in any order.

    Raises:
        ArgumentError: If a hub id or model folder of ``--vlm`` cannot be read.
    """
    flags = list(argv)
    configs: list[str] = []
    sections: list[str] = []
    replacing: dict[str, str] = {}
    # backwards, so that deleting an option leaves the indices of earlier ones valid
    for index, option, value in reversed(list(_file_options(argv))):
        del flags[index : index + (1 if "=" in argv[index] else 2)]
        check_section(option, value)
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
    """Returns where a command line sets the batch size of the data module.

    Args:
        argv: Options after the command.

    Returns:
        ``"the command line"``, or the name of the file that ``--data`` gives; None if neither sets it.
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


def without_sections(content: str, sections: Sequence[str], trainer_keys: Collection[str] | None = None) -> str:
    """Returns the text of a YAML file without some of its keys; text that is not a mapping is returned unchanged.

    Args:
        content: The text.
        sections: Top-level keys that are left out.
        trainer_keys: The keys of the section ``trainer`` that stay; None keeps them all.
    """
    if not sections and trainer_keys is None:
        return content
    try:
        loaded = parse_yaml(content)
    except yaml.YAMLError:
        return content  # the parser reports it, with file and line
    if not isinstance(loaded, dict):
        return content
    kept = {key: value for key, value in loaded.items() if key not in sections}
    if trainer_keys is not None and isinstance(trainer := kept.get("trainer"), dict):
        kept["trainer"] = {key: value for key, value in trainer.items() if key in trainer_keys}
    return content if kept == loaded else yaml.safe_dump(kept, sort_keys=False)


def _section_of(value: str) -> str:
    """Returns the section that a hub id or model folder stands for, as JSON for the parser."""
    try:
        return json.dumps(expand(value))
    except ValueError as error:
        raise argparse.ArgumentError(None, str(error)) from error


def point_at_shipped(section: Namespace | None) -> None:
    """Replaces values such as ``task: configs/tasks/porch.yaml`` by the path of the file that the package ships.

    A file of that name in the current folder takes precedence. The section is changed in place.
    """
    if section is None:
        return
    for key, value in section.items():
        if isinstance(value, str) and value.startswith(f"{PREFIX}/") and value.endswith((".yaml", ".yml")):
            section[key] = str(find_config(value) or value)


def parse_yaml(text: str) -> Any:
    """Parses YAML with libyaml, which takes a tenth of the time of ``yaml.safe_load``, where PyYAML is built with it.

    Raises:
        YAMLError: If the text is not YAML, with PyYAML's own message, which shows the line; libyaml's does not.
    """
    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return yaml.safe_load(text)
