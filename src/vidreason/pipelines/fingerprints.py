"""Fingerprints (short hashes) of the inputs of a stage; a stage runs again if one of them changes.

YAML files are hashed by their parsed content, so comments and the order of keys do not matter. The files that they name
(sections, task files, manifests) are included, and so are the files of models, the clips of manifests and folders, and
the code of classes of the user's own (``content.py``).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from vidreason.config.command_files import parse_yaml
from vidreason.config.files import find_config, shipped_folder
from vidreason.config.fit_folder import WITHOUT_EFFECT
from vidreason.datamodules.file_hash import content_sha
from vidreason.datamodules.sources.rows import read_table
from vidreason.datamodules.sources.table_paths import spellings
from vidreason.datamodules.task import explain_yaml_error
from vidreason.pipelines.content import code_prints, listing_print

_YAML_SUFFIXES = (".yaml", ".yml")
_FILE_SUFFIXES = (*_YAML_SUFFIXES, ".csv", ".jsonl", ".json")
_FOLDER_KEYS = ("path", "manifest", "adapter_path", "calibrator_path")  # other keys name folders that are written to
_MANIFEST_SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ENVIRONMENT = re.compile(r"\$\{oc\.env:(\w+)(?:,([^}]*))?\}")
_PROSE = ("README.md",)  # peft writes one beside an adapter


def fingerprint_settings(
    settings: Mapping[str, object], folder: Path | None = None, label: str = "set", roots: Sequence[Path] = ()
) -> dict[str, str]:
    """Fingerprints dotted settings and the files that they name.

    Args:
        settings: Dotted key to value.
        folder: Folder in which relative paths are searched before the current folder.
        label: Prefix of the keys of the result.
        roots: Folders besides its own that the paths of a manifest may be relative to.

    Returns:
        One entry per setting (the value as JSON), and one per file that it names.
    """
    prints: dict[str, str] = {}
    for key, value in _counted(settings).items():
        prints[f"{label} {key}"] = json.dumps(value, sort_keys=True, default=str)
        for leaf, item in _leaves(value, key):
            prints |= _named_files(leaf, item, folder or Path(), roots)
    return prints


def fingerprint_config(path: Path, name: str, roots: Sequence[Path] = ()) -> dict[str, str]:
    """Fingerprints a YAML file and, recursively, the files that it names.

    Args:
        path: The file.
        name: Name of the file in the result, independent of its location.
        roots: Folders besides its own that the paths of a manifest may be relative to.

    Raises:
        ValueError: If the file is not valid YAML.
    """
    content = _counted(read_yaml(path))
    prints = {f"file {name}": _sha(json.dumps(content, sort_keys=True, default=str))}
    for key, value in _leaves(content):
        prints |= _named_files(key, value, path.parent, roots)
    return prints


def named_values(last_key: str, files: Sequence[Path], settings: Mapping[str, object]) -> list[str]:
    """Returns the values of a key such as ``root`` in settings, YAML files and, recursively, the files they name."""
    found: dict[str, None] = {}
    waiting: list[tuple[object, Path]] = [(dict(settings), Path()), *((read_yaml(file), file.parent) for file in files)]
    seen = set(files)
    while waiting:
        content, folder = waiting.pop()
        for key, value in _leaves(content):
            for item in value if isinstance(value, list) else [value]:
                if not isinstance(item, str):
                    continue
                if key.rpartition(".")[2] == last_key:
                    found[_resolved(item)] = None
                file = _find(item, folder) if item.endswith(_YAML_SUFFIXES) else None
                if file is not None and file not in seen:
                    seen.add(file)
                    waiting.append((read_yaml(file), file.parent))
    return list(found)


def fingerprint_artefact(path: Path) -> str:
    """Returns a hash of the bytes of a file, or of all files in a folder (an adapter)."""
    if path.is_file():
        return content_sha(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name not in _PROSE):
        digest.update(f"{file.relative_to(path).as_posix()} {content_sha(file)}\n".encode())
    return digest.hexdigest()[:16]


def fingerprint_embedded_weights() -> str:
    """Returns a hash of the weights of the embedded base, from which stages start by default."""
    weights = Path(str(files("vidreason.lightning_modules"))) / "vlms" / "tiny" / "weights"
    return fingerprint_artefact(weights) if weights.is_dir() else "none"


def read_yaml(path: Path) -> object:
    """Reads one YAML file.

    Raises:
        ValueError: If it is not valid YAML; the message names file and line.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(explain_yaml_error(path, error)) from error


def _resolved(value: str) -> str:
    """Returns a value with OmegaConf's ``${oc.env:NAME,default}`` resolved, so that a file it points to is found."""
    return _ENVIRONMENT.sub(lambda match: os.environ.get(match[1], match[2] or ""), value)


def _find(name: str, folder: Path) -> Path | None:
    places = (folder / name, Path(name), shipped_folder() / name, find_config(name))
    return next((path for path in places if path is not None and path.exists()), None)


def _named_files(key: str, value: object, folder: Path, roots: Sequence[Path]) -> dict[str, str]:
    """Returns fingerprints of the files and folders that a setting names; {} if it names none."""
    if isinstance(value, list):
        return {name: sha for item in value for name, sha in _named_files(key, item, folder, roots).items()}
    if not isinstance(value, str) or not value:
        return {}
    text, last_key = _resolved(value), key.rsplit(".", 1)[-1]
    if last_key == "class_path":
        return code_prints(text)
    if not text.endswith(_FILE_SUFFIXES) and last_key not in _FOLDER_KEYS:
        return {}
    found = _find(text, folder)
    if found is None:
        return _hub_model(text) if last_key == "path" and _HUB_ID.fullmatch(text) else {}
    if found.suffix in _YAML_SUFFIXES:
        return fingerprint_config(found, value, roots)
    if found.is_file():
        clips = _listed_clips(found, roots) if found.suffix in _MANIFEST_SUFFIXES else []
        own = {f"file {value}": content_sha(found)}
        return own | ({f"clips of {value}": listing_print(clips)} if clips else {})
    return {f"folder {value}": listing_print([found])}


def _hub_model(name: str) -> dict[str, str]:
    """Returns the commit of a hub's model in the local cache, which its files belong to."""
    from transformers.utils.hub import cached_file  # seconds to import

    config = cached_file(
        name,
        "config.json",
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return {f"model {name}": Path(config).parent.name if isinstance(config, str) else "not on this machine"}


def _listed_clips(manifest: Path, roots: Sequence[Path]) -> list[Path]:
    """Returns the clips that a manifest lists, in every folder where they may lie: a replaced clip changes the data."""
    try:
        rows = read_table(manifest).rows
    except ValueError:  # not a table of clips, or one that the stage will reject
        return []
    folders = (manifest.parent, *roots)
    texts = [text for row in rows if row.get("path") for text in spellings(row.get("path"))]
    return [folder / text for text in texts for folder in folders]


def _counted(content: Any, key: str = "") -> Any:
    """Returns the content of a YAML file without the settings that change nothing of what is computed."""
    if isinstance(content, list):
        return [_counted(item, key) for item in content]
    if not isinstance(content, Mapping):
        return content
    counted = {}
    for name, value in content.items():
        place = f"{key}.{name}"
        if place.endswith(WITHOUT_EFFECT):
            continue
        found = _counted(value, place)
        if found or not value:  # a section of such settings only is left out with them
            counted[name] = found
    return counted


def _leaves(content: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yields (dotted key, value) of every value that is neither a mapping nor a list of mappings or lists."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list) and any(isinstance(item, dict | list) for item in content):
        for item in content:
            yield from _leaves(item, key)
    else:
        yield key, content


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
