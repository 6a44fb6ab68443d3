"""The task: classes with definitions, the question, the prompts and the metadata that may enter them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from vidreason.datamodules.atomic_files import write_text
from vidreason.datamodules.clips.time_limit import look_at
from vidreason.datamodules.templates import DEFAULT_TEMPLATES
from vidreason.rewards.completion import find_markup

_TASK_KEYS = ("name", "question", "classes", "ordinal", "metadata_fields", "prompts")
_CLASS_KEYS = ("name", "definition")
_PLACEHOLDERS = ("question", "classes", "names", "fields")
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


def explain_yaml_error(file: Path, error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """Returns why a file could not be read as YAML, in one line, with line and column if they are known."""
    if isinstance(error, UnicodeDecodeError):
        return f"{file}: not in UTF-8 (byte {error.start}): save it as UTF-8"
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"{file}: not valid YAML: {' '.join(str(error).split())}"
    mark = error.problem_mark or error.context_mark
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{file}{place}: not valid YAML: {error.problem or error.context}; check the indentation and quotes there"


@dataclass(frozen=True)
class ClassSpec:
    """One class: its name, which is the label, and its definition."""

    name: str
    definition: str = ""


@dataclass(frozen=True)
class Task:
    """The task that a model solves for every clip; all stages read it from one file.

    Raises:
        ValueError: If there are fewer than two classes, empty or repeated names, or unknown prompt kinds or fields.
    """

    name: str
    question: str
    classes: tuple[ClassSpec, ...]
    ordinal: bool = False
    """True if the order of the classes is a scale."""
    metadata_fields: tuple[str, ...] = ()
    """The only metadata columns that may enter a prompt."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Templates by kind (the keys of ``DEFAULT_TEMPLATES``); a kind that is missing uses the default."""
    file: str = field(default="", compare=False)
    """File that the task was read from, for error messages."""

    def __post_init__(self) -> None:
        if not self.name or not self.question:
            raise ValueError("a task needs a name and a question")
        if len(self.classes) < 2:
            raise ValueError(f"a task needs at least two classes, got {len(self.classes)}")
        _check_names(self.label_names)
        for kind, template in self.prompts.items():
            _check_template(kind, template)
        if len(set(self.metadata_fields)) != len(self.metadata_fields):
            raise ValueError(f"metadata_fields names a column twice: {list(self.metadata_fields)}")

    @property
    def label_names(self) -> tuple[str, ...]:
        """[C] class names; the index of a label is its position."""
        return tuple(spec.name for spec in self.classes)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Task:
        """Reads a task file.

        Args:
            path: The file, as ``find_task_file`` resolves it.

        Raises:
            ValueError: If a key is wrong, missing or unknown; the message names file and key.
        """
        file = find_task_file(path)
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(explain_yaml_error(file, error)) from error
        try:
            return replace(_task_from(content), file=str(file))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def from_labels(cls, name: str, labels: Sequence[str]) -> Task:
        """Returns a task that has class names only, for data without a task file."""
        return cls(
            name=name, question="What happens in the video?", classes=tuple(ClassSpec(label) for label in labels)
        )

    def to_yaml(self, path: Path) -> None:
        """Writes a file from which ``from_yaml`` reads this task."""
        content = {
            "name": self.name,
            "question": self.question,
            "classes": [{"name": spec.name, "definition": spec.definition} for spec in self.classes],
            "ordinal": self.ordinal,
            "metadata_fields": list(self.metadata_fields),
            "prompts": dict(self.prompts),
        }
        write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    def sha(self) -> str:
        """Returns the hash of the whole task; traces and adapters store it."""
        content = {
            "name": self.name,
            "question": self.question,
            "classes": [[spec.name, spec.definition] for spec in self.classes],
            "ordinal": self.ordinal,
            "metadata_fields": list(self.metadata_fields),
            "prompts": dict(self.prompts),
        }
        text = json.dumps(content, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def prompt_text(self, kind: str, fields: Mapping[str, str]) -> str:
        """Returns the prompt of a kind; a template line whose placeholder is empty is dropped.

        Args:
            kind: ``describe``, ``reason``, ``answer``, ``answer_first``, ``label`` or ``calibrate``.
            fields: The clip's metadata; columns that the task does not list are ignored.

        Raises:
            ValueError: If the kind is unknown.
        """
        if kind not in DEFAULT_TEMPLATES:
            raise ValueError(f"unknown prompt kind {kind!r}: one of {', '.join(DEFAULT_TEMPLATES)}")
        shown = [(name, fields.get(name, "").strip()) for name in self.metadata_fields]
        values = {
            "question": self.question,
            "classes": "\n".join(
                f"- {c.name}: {c.definition}" if c.definition else f"- {c.name}" for c in self.classes
            ),
            "names": ", ".join(self.label_names),
            "fields": "\n".join(f"{name}: {value}" for name, value in shown if value),
        }
        lines = self.prompts.get(kind, DEFAULT_TEMPLATES[kind]).splitlines()
        kept = [line for line in lines if line.strip() != "{fields}" or values["fields"]]
        return _PLACEHOLDER.sub(lambda match: values[match[1]], "\n".join(kept)).strip()


def find_task_file(path: str | Path) -> Path:
    """Finds a task file: as given (from the current folder), else among the configs of the installed package.

    Args:
        path: For example ``tasks/weizmann.yaml`` or ``my_task.yaml``.

    Raises:
        ValueError: If there is no such file, or it does not answer; the message names the places searched.
    """
    given = Path(path)
    if look_at(given) == "file":
        return given
    shipped = Path(str(files("vidreason.configs"))) / given
    if shipped.is_file():
        return shipped
    places = [str(given.absolute())] + ([] if given.is_absolute() else [str(shipped)])
    raise ValueError(f"no task file {given}: looked at {' and '.join(places)}")


def _task_from(content: Any) -> Task:
    """Builds a task from parsed YAML and checks its structure."""
    if not isinstance(content, dict):
        raise ValueError(f"a task file is a mapping with the keys {', '.join(_TASK_KEYS)}")
    _check_known_keys(content, _TASK_KEYS, "")
    for key in ("name", "question", "classes"):
        if key not in content:
            raise ValueError(f"the key '{key}' is missing")
    ordinal = content.get("ordinal", False)
    if not isinstance(ordinal, bool):
        raise ValueError(f"'ordinal' must be true or false, got {ordinal!r}")
    return Task(
        name=_text(content["name"], "name"),
        question=_text(content["question"], "question"),
        classes=tuple(_class_from(item, i) for i, item in enumerate(_list(content["classes"], "classes"))),
        ordinal=ordinal,
        metadata_fields=tuple(
            _text(item, f"metadata_fields[{i}]")
            for i, item in enumerate(_list(content.get("metadata_fields") or [], "metadata_fields"))
        ),
        prompts=_prompts_from(content.get("prompts") or {}),
    )


def _class_from(item: Any, index: int) -> ClassSpec:
    where = f"classes[{index}]"
    if not isinstance(item, dict):
        return ClassSpec(_text(item, where))
    _check_known_keys(item, _CLASS_KEYS, f" in {where}")
    if "name" not in item:
        raise ValueError(f"{where} has no 'name'")
    definition = item.get("definition")
    return ClassSpec(
        _text(item["name"], f"{where}.name"),
        "" if definition is None else _text(definition, f"{where}.definition"),
    )


def _prompts_from(item: Any) -> dict[str, str]:
    if not isinstance(item, dict):
        raise ValueError("'prompts' must be a mapping from kind to template")
    return {str(kind): _text(text, f"prompts.{kind}") for kind, text in item.items()}


def _check_known_keys(content: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    unknown = [str(key) for key in content if key not in known]
    if unknown:
        # in {name: x, definition: a, b} YAML takes `b` for a key of its own, without a value
        cut = [str(key) for key, value in content.items() if key in unknown and value is None]
        hint = "; put quotes around a text that holds a comma" if cut else ""
        raise ValueError(f"unknown key {', '.join(map(repr, unknown))}{where}; known are {', '.join(known)}{hint}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        hint = "; quote it" if isinstance(value, bool | int | float) else ""
        raise ValueError(f"'{where}' must be text, got {value!r}{hint}")
    return value.strip()


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"'{where}' must be a list, got {value!r}")
    return value


def _check_names(names: Sequence[str]) -> None:
    """Checks that answers can be matched to the names."""
    seen: set[str] = set()
    for name in names:
        if not name.strip() or name != name.strip() or "\n" in name:
            raise ValueError(f"class name {name!r} must be one line of text without white space around it")
        if (markup := find_markup(name)) is not None:
            raise ValueError(f"class name {name!r} holds {markup!r}, which may not stand inside an answer")
        if name.casefold() in seen:
            raise ValueError(f"class name {name!r} occurs twice (names are compared without regard to case)")
        seen.add(name.casefold())


def _check_template(kind: str, template: str) -> None:
    if kind not in DEFAULT_TEMPLATES:
        raise ValueError(f"unknown prompt kind {kind!r}: one of {', '.join(DEFAULT_TEMPLATES)}")
    unknown = [name for name in _PLACEHOLDER.findall(template) if name not in _PLACEHOLDERS]
    if unknown:
        known = ", ".join(f"{{{name}}}" for name in _PLACEHOLDERS)
        raise ValueError(f"prompt '{kind}' has the unknown placeholder {{{unknown[0]}}}; known are {known}")
