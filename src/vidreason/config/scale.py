"""Profiles: the settings of a stage that depend on the size of its model (``configs/scale/``).

The vlm section names a profile (``scale``), a stage file names its part of it (``profile: grpo``). Both are read from
the YAML files before anything is parsed, because a profile applies first: every file and flag overrides it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from vidreason.config.command_files import OrderedFiles, parse_yaml
from vidreason.config.files import find_config
from vidreason.spelling import did_you_mean

DEFAULT = "configs/scale/lora_2b_8b.yaml"
"""The profile of a vlm section that names none."""
_CLASSES = ("model", "data", "vlm")
_SECTIONS = (*_CLASSES, "trainer")
_KEYS = (*_SECTIONS, "parts", "full")
_FULL = "full"


@dataclass(frozen=True)
class Profile:
    """The part of a profile that applies to a stage."""

    name: str
    """File of the profile, and the file that is laid over it."""
    part: str
    settings: Mapping[str, Mapping[str, Any]]
    """Section (``model``, ``data``, ``vlm``, ``trainer``) to its settings; those of a class are its ``init_args``."""

    def config(self, classes: Mapping[str, str]) -> str:
        """Returns the settings as a config for the parser.

        Args:
            classes: Section to the ``class_path`` that the stage has there; the parser needs it beside ``init_args``.
        """
        made: dict[str, Any] = {}
        for section, settings in self.settings.items():
            if section not in _CLASSES:
                made[section] = settings
            elif section in classes:
                made[section] = {"class_path": classes[section], "init_args": settings}
        return json.dumps(made)

    def describe(self, config: Namespace) -> list[str]:
        """Returns lines with every setting of the profile as it holds in ``config``, and where that differs.

        Args:
            config: The parsed configuration of the stage.
        """
        lines = [f"settings: {self.name}, part {self.part} (docs/budgets.md)"]
        for section, settings in self.settings.items():
            prefix = f"{section}.init_args." if section in _CLASSES else f"{section}."
            words = []
            for key, value in leaves(settings):
                found = config.get(prefix + key)
                changed = "" if _same(found, value) else f" (profile: {_text(value)})"
                words.append(f"{key.replace('.init_args', '')} {_text(found)}{changed}")
            lines.append(f"  {section}: {', '.join(words)}")
        return lines


@dataclass(frozen=True)
class StageSections:
    """The sections of a stage, as far as they decide which profile it takes."""

    part: str | None
    """The stage's part of a profile; None takes no profile."""
    file: str
    full: bool
    """True if all weights are trained (``vlm.lora`` is null)."""
    classes: Mapping[str, str]
    """Section to its ``class_path``."""

    def profile(self) -> Profile | None:
        """Reads the profile; None if the stage takes none.

        Raises:
            ValueError: If the file does not exist, is malformed, or has no such part.
        """
        if self.part is None:
            return None
        over = _read(self.file).get(_FULL) if self.full else None
        name = f"{self.file} under {over}" if over else self.file
        return Profile(name, self.part, read_profile(self.file, self.part, self.full))


def find_profile(files: OrderedFiles) -> tuple[Profile | None, list[str]]:
    """Returns the profile that model and stage file of a command line call for, and the options that apply it.

    Raises:
        ArgumentError: If the profile does not exist, is malformed, or lacks the part.
    """
    found = read_stage(files.arguments, files.stage_file, files.replaced)
    try:
        profile = found.profile()
    except ValueError as error:
        raise argparse.ArgumentError(None, str(error)) from error
    return profile, [] if profile is None else ["--config", profile.config(found.classes)]


def read_stage(arguments: Sequence[str], stage_file: str | None, replaced: Sequence[str]) -> StageSections:
    """Reads part, profile and classes from the files and flags of a command line.

    Args:
        arguments: Options in the order in which they apply.
        stage_file: The file from which ``replaced`` is left out.
        replaced: Sections that the command line gives as a whole.
    """
    classes: dict[str, str] = {}
    vlm: dict[str, Any] = {}
    part: Any = None
    for content in _contents(arguments, stage_file, replaced):
        part = content.get("profile", part)
        for section in _CLASSES:
            given = content.get(section)
            if isinstance(given, str):  # a class
                given = {"class_path": given}
            if isinstance(given, dict):
                if isinstance(path := given.get("class_path"), str):
                    classes[section] = path
                if section == "vlm" and isinstance(options := given.get("init_args"), dict):
                    vlm |= options
    return StageSections(None if part is None else str(part), vlm.get("scale") or DEFAULT, not vlm.get("lora"), classes)


def read_profile(file: str, part: str, full: bool) -> dict[str, dict[str, Any]]:
    """Returns the settings of a part of a profile by section.

    Args:
        file: The profile, as a vlm section names it.
        part: The part.
        full: Whether to lay the profile that the file names under ``full`` over it.

    Raises:
        ValueError: If the file does not exist, is malformed, or has no such part.
    """
    content = _read(file)
    parts = content.get("parts") or {}
    if part not in parts:
        raise ValueError(
            f"profile: {file} has no part {part!r}{did_you_mean(part, list(parts), '; ')}; it has {', '.join(parts)}"
        )
    settings: dict[str, dict[str, Any]] = {}
    layers = [content, parts[part]]
    if full and content.get(_FULL):
        over = _read(content[_FULL])
        layers += [over, (over.get("parts") or {}).get(part) or {}]
    for layer in layers:
        for section in _SECTIONS:
            settings[section] = merged(settings.get(section, {}), layer.get(section) or {})
    return {section: values for section, values in settings.items() if values}


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested settings in which those of ``over`` replace those of ``under``."""
    found = dict(under)
    for key, value in over.items():
        before = found.get(key)
        found[key] = merged(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return found


def leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of every value that is not a mapping."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(file: str) -> dict[str, Any]:
    path = find_config(file)
    if path is None:
        raise ValueError(f"vlm.scale: no file {file}, neither here nor among the shipped configs (configs/scale/)")
    content = parse_yaml(path.read_text(encoding="utf-8"))
    unknown = [key for key in content if key not in _KEYS] if isinstance(content, dict) else ["no mapping"]
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; a profile has {', '.join(_KEYS)}")
    return dict(content)


def _contents(arguments: Sequence[str], stage_file: str | None, replaced: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields what every option of a command line sets, sections as mappings; what is malformed sets nothing here."""
    words = list(arguments)
    while words:
        option, equals, value = words.pop(0).partition("=")
        if not option.startswith("--"):
            continue
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        if option == "--config":
            path = find_config(value)
            content = _mapping(value) if path is None else _mapping(_text_of(path))
            left_out = replaced if value == stage_file else ()
            folder = Path() if path is None else path.parent
            yield {key: _section(item, folder) for key, item in content.items() if key not in left_out}
        elif option.removeprefix("--") in _CLASSES:
            yield {option.removeprefix("--"): _section(value, Path())}
        else:
            nested = _value(value)
            for name in reversed(option.removeprefix("--").split(".")):
                nested = {name: nested}
            yield nested


def _section(item: Any, folder: Path) -> Any:
    """Returns the content of the file that a value names, or the value itself."""
    if not isinstance(item, str):
        return item
    if item.lstrip().startswith("{"):
        return _mapping(item)
    beside = folder / item
    path = beside if beside.is_file() else find_config(item)
    return item if path is None or path.suffix not in (".yaml", ".yml") else _mapping(_text_of(path))


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")  # the parser reports what is no UTF-8


def _mapping(text: str) -> dict[str, Any]:
    found = _value(text)
    return found if isinstance(found, dict) else {}


def _value(text: str) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return text  # the parser reports it


def _same(found: Any, value: Any) -> bool:
    return bool(found == value) or _text(found) == _text(value)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, default=str).strip('"')
