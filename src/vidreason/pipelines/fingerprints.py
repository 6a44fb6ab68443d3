"""What a stage depends on, as short hashes: two runs of a stage agree exactly where their fingerprints do.

YAML files count by their content, not their spelling (comments and order are free), and so do the files that they
name: sections, task files, manifests. Model folders, folders of clips and the clips that a manifest lists count by
names, sizes and times.
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
_FOLDER_KEYS = ("path", "manifest", "adapter_path")  # other folders are written to, not read
_MANIFEST_SUFFIXES = (".csv", ".jsonl")
_ENVIRONMENT = re.compile(r"\$\{oc\.env:(\w+)(?:,([^}]*))?\}")
_PROSE = ("README.md",)


def fingerprint_settings(
    settings: Mapping[str, object], folder: Path | None = None, label: str = "set"
) -> dict[str, str]:
    """Fingerprints dotted settings and the files that they name.

    Args:
        settings: Dotted key to value.
        folder: Where relative paths are looked for before the current folder.
        label: What the keys of the result begin with.

    Returns:
        One entry per setting, in readable form, and one per file below it.
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
        name: What it is called in the result, the same wherever it lies.

    Raises:
        ValueError: The file is not valid YAML.
    """
    content = read_yaml(path)
    prints = {f"file {name}": _sha(json.dumps(content, sort_keys=True, default=str))}
    for key, value in _leaves(content):
        prints |= _named_files(key, value, path.parent)
    return prints


def fingerprint_artefact(path: Path) -> str:
    """The hash of a file's bytes, or of the bytes of a folder's files (an adapter)."""
    if path.is_file():
        return content_sha(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name not in _PROSE):
        digest.update(f"{file.relative_to(path).as_posix()} {content_sha(file)}\n".encode())
    return digest.hexdigest()[:16]


def fingerprint_embedded_weights() -> str:
    """The hash of the embedded base model's files, which every default stage starts from."""
    weights = Path(str(files("vidreason.lightning_modules"))) / "vlms" / "tiny" / "weights"
    return fingerprint_artefact(weights) if weights.is_dir() else "none"


def read_yaml(path: Path) -> object:
    """Reads one YAML file.

    Raises:
        ValueError: It is not valid YAML; the message names file and line.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def _named_files(key: str, value: object, folder: Path) -> dict[str, str]:
    """Fingerprints of what a setting names on disk; {} where it names nothing."""
    if isinstance(value, list):
        return {name: sha for item in value for name, sha in _named_files(key, item, folder).items()}
    if not isinstance(value, str) or not value:
        return {}
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
    """What the rows of a table name beside it; a clip that is mended is no longer the same data."""
    try:
        rows = read_table(manifest).rows
    except ValueError:  # no table of clips, or one that the stage will refuse
        return []
    return [manifest.parent / row.get("path") for row in rows if row.get("path")]


def _listing(files: Iterable[Path]) -> str:
    """Returns names, sizes and times of files."""
    stats = [(file.as_posix(), file.stat()) for file in files if file.is_file()]
    return "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)


def _leaves(content: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Dotted key and value of everything that is neither mapping nor list of mappings."""
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
