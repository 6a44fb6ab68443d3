"""Fingerprints (short hashes) of the inputs of a stage; a stage runs again if one of them changes.

YAML files are hashed by their parsed content, so comments and the order of keys do not matter. The files that they name
(sections, task files, manifests) are included. Model folders, folders of clips and the clips of a manifest are hashed
by names, sizes and modification times, because reading them would take too long.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path

import yaml

from vidreason.config.files import find_config, shipped_folder
from vidreason.datamodules.file_hash import content_sha
from vidreason.datamodules.sources.rows import read_table

_YAML_SUFFIXES = (".yaml", ".yml")
_FILE_SUFFIXES = (*_YAML_SUFFIXES, ".csv", ".jsonl", ".json")
_FOLDER_KEYS = ("path", "manifest", "adapter_path")  # other keys name folders that are written to
_MANIFEST_SUFFIXES = (".csv", ".jsonl")
_ENVIRONMENT = re.compile(r"\$\{oc\.env:(\w+)(?:,([^}]*))?\}")
_PROSE = ("README.md",)  # peft writes one beside an adapter


def fingerprint_settings(
    settings: Mapping[str, object], folder: Path | None = None, label: str = "set"
) -> dict[str, str]:
    """Fingerprints dotted settings and the files that they name.

    Args:
        settings: Dotted key to value.
        folder: Folder in which relative paths are searched before the current folder.
        label: Prefix of the keys of the result.

    Returns:
        One entry per setting (the value as JSON), and one per file that it names.
    """
    prints: dict[str, str] = {}
    for key, value in settings.items():
        prints[f"{label} {key}"] = json.dumps(value, sort_keys=True, default=str)
        prints |= _named_files(key, value, folder or Path())
    return prints


def fingerprint_config(path: Path, name: str) -> dict[str, str]:
    """Fingerprints a YAML file and, recursively, the files that it names.

    Args:
        path: The file.
        name: Name of the file in the result, independent of its location.

    Raises:
        ValueError: If the file is not valid YAML.
    """
    content = read_yaml(path)
    prints = {f"file {name}": _sha(json.dumps(content, sort_keys=True, default=str))}
    for key, value in _leaves(content):
        prints |= _named_files(key, value, path.parent)
    return prints


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
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def _named_files(key: str, value: object, folder: Path) -> dict[str, str]:
    """Returns fingerprints of the files and folders that a setting names; {} if it names none."""
    if isinstance(value, list):
        return {name: sha for item in value for name, sha in _named_files(key, item, folder).items()}
    if not isinstance(value, str) or not value:
        return {}
    # OmegaConf's ${oc.env:NAME,default} is resolved, so that the file it points to is found
    text = _ENVIRONMENT.sub(lambda match: os.environ.get(match[1], match[2] or ""), value)
    last_key = key.rsplit(".", 1)[-1]
    is_path = text.endswith(_FILE_SUFFIXES) or last_key in _FOLDER_KEYS
    if not is_path:
        return {}
    places = (folder / text, Path(text), shipped_folder() / text, find_config(text))
    found = next((path for path in places if path is not None and path.exists()), None)
    if found is None:
        return {}
    if found.suffix in _YAML_SUFFIXES:
        return fingerprint_config(found, value)
    if found.is_file():
        clips = _listing(_listed_clips(found)) if found.suffix in _MANIFEST_SUFFIXES else ""
        return {f"file {value}": content_sha(found) + (f" with clips {_sha(clips)}" if clips else "")}
    return {f"folder {value}": _sha(_listing(sorted(found.rglob("*"))))}


def _listed_clips(manifest: Path) -> list[Path]:
    """Returns the clips that a manifest lists: a clip that is replaced changes the data."""
    try:
        rows = read_table(manifest).rows
    except ValueError:  # not a table of clips, or one that the stage will reject
        return []
    return [manifest.parent / row.get("path") for row in rows if row.get("path")]


def _listing(files: Iterable[Path]) -> str:
    """Returns names, sizes and times of files."""
    stats = [(file.as_posix(), file.stat()) for file in files if file.is_file()]
    return "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)


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
