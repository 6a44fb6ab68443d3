"""Shortens the parser's errors about a command line or YAML to one line that names the file and the remedy."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import get_args, get_type_hints

import lightning as L
import yaml

from vidreason.config.command_files import YAML_SUFFIXES, config_files
from vidreason.config.files import find_config
from vidreason.config.moved_keys import GROUPS, MODEL, explain_moved, moved_settings, new_place
from vidreason.spelling import did_you_mean, nearest

_TOP_LEVEL = ("seed_everything", "trainer", "model", "data", "vlm", "profile", "run_dir", "ckpt_path", "config")
# Beginnings of lines of jsonargparse that tell a user nothing.
_NOISE = (
    "Does not validate against any of the Union subtypes",
    "Subtypes:",
    "Errors:",
    "- Expected a <class 'NoneType'>",
    "Given value type:",
    "full_key:",
    "object_type=",
)
_HOMES = {f"trainer.{name}": f"lightning.pytorch.{name}" for name in ("callbacks", "plugins")}
_HOMES |= {"trainer.logger": "lightning.pytorch.loggers", "trainer.strategy": "lightning.pytorch.strategies"}
"""Modules of the classes whose name alone is a valid ``class_path``."""
_MAX_CHARS = 400
_MOST_LISTED = 24  # names; a longer list would hide the message
_NOT_GIVEN = ("self", "args", "kwargs", "vlm", "encoder", "params")
"""Arguments of classes that no YAML file sets."""


def missing_package(message: str) -> ValueError | None:
    """Returns the error of a class that needs a package which is not installed; None for any other message."""
    lacking = re.search(r"Requirement '(.+?)' not met|No module named '(.+?)'", message)
    if lacking is None:
        return None
    named = re.search(r"class_path '([\w.]+)'", message)
    package = lacking[1] or lacking[2]
    return ValueError(f"{named[1] + ': ' if named else ''}needs a package: pip install '{package}', or leave it out")


def explain_call(message: str, argv: Sequence[str]) -> str:
    """Returns an error of the parser about a command line in one line; one about a YAML file's syntax as it is."""
    try:
        return explain(message, config_files(argv), argv)
    except argparse.ArgumentError as error:
        return str(error)


def explain(message: str, files: Sequence[Path], flags: Sequence[str] = ()) -> str:
    """Returns an error of the parser in one line.

    Args:
        message: Text of the exception.
        files: YAML files of the command line, to name the one with the mistake.
        flags: The command line.
    """
    # These texts of jsonargparse, OmegaConf and argparse may change between their versions.
    variable = re.search(r"Environment variable '(\w+)' not found", message)
    if variable:
        return _unset_variable(variable[1], files)
    wrong_name = _wrong_name(message, files)
    if wrong_name is not None:
        return wrong_name
    moved = _moved_key(message, files, flags)
    if moved is not None:
        return moved
    required = re.search(r"the following arguments are required: (.+)", message)
    if required:
        sections = re.sub(r"\w+\.(?=\w)", "", required[1])
        return f"nothing says what {sections} should be: give --config configs/<stage>.yaml (see `vidreason configs`)"
    nested = re.search(
        r"class_path '([\w.]+)':\s+(?:Group '(\S+)' does not accept option '(\S+)'|unrecognized arguments: --([\w.]+))",
        message,
    )
    if nested:
        return _nested_argument(nested[1], nested[4] or f"{nested[2]}.{nested[3]}", files if nested[2] else ())
    unknown = re.search(r"does not accept option '(\S+)'", message)
    if unknown:
        return _unknown_key(unknown[1], files)
    unknown = re.search(r"unrecognized arguments: --(\S+)", message)
    if unknown:
        return _unknown_key(unknown[1].partition("=")[0], ())
    rejected = re.search(r"Option '(\w+)[\w.]*' is not accepted", message)
    if rejected:
        return _rejected_argument(rejected[1], message, () if "NestedArg(" in message else files)
    return _flat(message)


def _moved_key(message: str, files: Sequence[Path], flags: Sequence[str]) -> str | None:
    """Returns the explanation of a setting that the message names and that has moved, or None."""
    contents = [(path, yaml.safe_load(path.read_text(encoding="utf-8"))) for path in files]
    found = [(*moved, "") for moved in _moved_flags(flags)]
    for path, content in contents:
        is_section = isinstance(content, dict) and "init_args" in content  # of --model FILE
        found += [(*moved, str(path)) for moved in moved_settings({"model": content} if is_section else content)]
    models = [content.get("model") for _, content in contents if isinstance(content, dict)]
    classes = re.findall(r"class_path(?:=|'?:? )'([\w.]+)'", message)
    classes += [str(model.get("class_path")) for model in models if isinstance(model, dict)]
    taken = {name for class_path in classes for name in _parameters(class_path)}
    for old, new, place in found:
        old_name, new_name = (key.removeprefix(MODEL).partition(".")[0] for key in (old, new))
        # the old name of a setting may still be a valid argument of a user's own class
        gone = old_name in GROUPS or old_name not in taken
        if re.search(rf"\b{old_name}\b", message) and gone and (new_name in taken or new_name == "trainer"):
            return explain_moved(old, new, place)
    return None


def _moved_flags(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields (old key, new key) of every flag whose setting has moved."""
    for index, word in enumerate(flags):
        key, equals, text = word.removeprefix("--").partition("=")
        text = text if equals else "".join(flags[index + 1 : index + 2])
        if word.startswith("--") and (new := new_place(key, yaml.safe_load(text) if text[:1] == "{" else text)):
            yield key, new


def _unset_variable(name: str, files: Sequence[Path]) -> str:
    users = [path for path in files if f"oc.env:{name}" in path.read_text(encoding="utf-8")]
    used_by = f", which {users[0]} uses," if users else ""
    return f"the environment variable {name}{used_by} is not set: export {name}=..."


def _wrong_name(message: str, files: Sequence[Path]) -> str | None:
    """Returns the explanation of a file or a class that does not exist; None for any other message."""
    missing = re.search(r"Expected a path but (\S+) either not accessible|File does not exist: '(.+?)'", message)
    file = (missing[1] or missing[2]) if missing else ""
    if file.endswith(YAML_SUFFIXES):
        return _missing_file(file, files)
    return _wrong_class(message, files) or (_missing_file(file, files) if file else None)


def _wrong_class(message: str, files: Sequence[Path]) -> str | None:
    """Returns the explanation of a class that does not exist or lacks an argument; None for any other message."""
    key = found[1] if (found := re.search(r'Parser key "([\w.]+)"', message)) else ""
    wrong = re.search(
        r"class_path '([\w.]+)':\s+(?:module '[\w.]+' has no attribute '\w+'|No module named '([\w.]+)'"
        r"|the following arguments are required: ([\w, ]+))",
        message,
    )
    if wrong is not None and wrong[3] is not None and key:
        nested = len(set(re.findall(r"given class_path '([\w.]+)'", message))) > 1
        as_flag = "" if nested else f", or give --{key}.init_args.{wrong[3].partition(',')[0]} VALUE"
        return f"{key}: {wrong[1]} needs {wrong[3]}: set it in init_args in a YAML file{as_flag}"
    if wrong is not None and wrong[3] is None and (wrong[2] is None or f"{wrong[1]}.".startswith(f"{wrong[2]}.")):
        name, home = wrong[1].rpartition(".")[2], wrong[1].rpartition(".")[0]
    elif bare := re.search(r"Expected a dot import path string: (\w+)", message):
        name, home = bare[1], _HOMES.get(key, "")
    else:
        return None
    place = f"{key}: " if key else ""
    try:
        known = [other for other, value in vars(import_module(home)).items() if inspect.isclass(value)]
    except (ImportError, ValueError):
        return f"{place}no class {wrong[1] if wrong else name}{_named_in(name, files)}: class_path is MODULE.CLASS"
    return f"{place}no class {name!r} in {home}{_named_in(name, files)}{did_you_mean(name, known)}"


def _missing_file(name: str, files: Sequence[Path]) -> str:
    name = name.removeprefix(f"{Path.cwd()}/")
    named_in = _named_in(name, files)
    if named_in and find_config(name) is not None:
        return (
            f"no such file: {name}{named_in}: paths in a YAML are relative to it; give the shipped file on the command "
            "line (--vlm, --data ...), or copy the files there with `vidreason configs --copy configs`"
        )
    return f"no such file: {name}{named_in} (`vidreason configs` lists the shipped ones)"


def _unknown_key(key: str, files: Sequence[Path]) -> str:
    section, _, rest = key.partition(".")
    if section not in _TOP_LEVEL:
        return f"unknown key {key!r}{_named_in(section, files)}{_nearest_or_all(section, _TOP_LEVEL)}"
    last = rest.rpartition(".")[2] or section
    known = inspect.signature(L.Trainer.__init__).parameters if section == "trainer" else ()
    return f"unknown key {key!r}{_named_in(last, files)}{_nearest_or_all(last, known)}"


def _rejected_argument(name: str, message: str, files: Sequence[Path]) -> str:
    classes = re.findall(r"class_path(?:=|'?:? )'([\w.]+)'", message)
    known = [parameter for path in classes for parameter in _parameters(path)]
    owner = next((path for path in reversed(classes) if nearest(name, _parameters(path))), None)
    taker = owner or (classes[0] if classes else "the class")
    return f"{taker} takes no argument {name!r}{_named_in(name, files)}{_nearest_or_all(name, known)}"


def _nested_argument(class_path: str, dotted: str, files: Sequence[Path]) -> str:
    """Explains an unknown nested argument, such as ``frames.num_frame`` of a data module."""
    *outer, name = dotted.split(".")
    for argument in outer:
        if argument not in _parameters(class_path):
            name = argument
            break
        class_path = _class_of_argument(class_path, argument) or class_path
    meant = _nearest_or_all(name, _parameters(class_path))
    return f"{class_path} takes no argument {name!r}{_named_in(name, files)}{meant}"


def _class_of_argument(class_path: str, argument: str) -> str | None:
    """Returns the class path of the type of an argument; None if it is a built-in type or unknown."""
    module, _, name = class_path.rpartition(".")
    for base in inspect.getmro(getattr(import_module(module), name)):
        hint = get_type_hints(vars(base)["__init__"]).get(argument) if "__init__" in vars(base) else None
        for option in (hint, *get_args(hint)):
            if inspect.isclass(option) and option.__module__ != "builtins":
                return f"{option.__module__}.{option.__qualname__}"
    return None


def _parameters(class_path: str) -> list[str]:
    """Returns the argument names of a class and its bases; an empty list if it cannot be imported."""
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(module), name, None)
    except (ImportError, ValueError):
        return []
    bases = inspect.getmro(found) if inspect.isclass(found) else ()  # **kwargs pass arguments on to bases
    return [key for base in bases if "__init__" in vars(base) for key in inspect.signature(base).parameters]


def _named_in(word: str, files: Sequence[Path]) -> str:
    """Returns " in FILE" for the first file that contains the word, or an empty text."""
    pattern = re.compile(rf"(?<![\w/]){re.escape(word)}(?!\w)")
    users = [path for path in files if pattern.search(path.read_text(encoding="utf-8"))]
    return f" in {users[0]}" if users else ""


def _nearest_or_all(name: str, known: Iterable[str]) -> str:
    """The nearest of the names there are; where none is near, and they are few, all of them."""
    names = dict.fromkeys(other for other in known if other not in _NOT_GIVEN)
    if nearest(name, names) is not None:
        return did_you_mean(name, names)
    return f"; there are {', '.join(names)}" if 0 < len(names) <= _MOST_LISTED else ""


def _flat(message: str) -> str:
    """Joins the informative lines of a message to one line of limited length."""
    lines = [line.strip() for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith(_NOISE)]
    if any("Problem with given class_path" in line for line in kept):
        kept = [line for line in kept if not line.startswith("Given value:")]
    text = re.sub(r'Parser key "(\S+?)":', r"\1:", " ".join(line.removeprefix("- ") for line in kept))
    return text if len(text) <= _MAX_CHARS else text[: _MAX_CHARS - 3] + "..."


def cause_of(error: Exception) -> Exception:
    """Returns the innermost error that the parser wrapped in "does not validate against any of the Union subtypes"."""
    cause = error.__cause__
    return cause_of(cause) if isinstance(cause, ValueError) else error
