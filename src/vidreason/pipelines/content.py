"""Fingerprints of clips, folders and code: what a stage reads that no YAML file names one by one."""

from __future__ import annotations

import ast
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from vidreason.datamodules.clips.time_limit import LOOK_TIMEOUT, ReadTimeoutError, call_for_files
from vidreason.datamodules.file_hash import content_sha

UNPROVEN = "unproven: "
"""Beginning of the fingerprint of an input that cannot be proven unchanged; a finished stage then runs again."""
_WHOLE = 1 << 20  # bytes; a larger file is hashed at its beginning, its end and two places between
_BLOCK = 1 << 18
_LOADS_BY_NAME = ("import_module", "__import__", "exec", "eval", "exec_module")


def file_print(path: Path) -> str:
    """Returns size, modification time and a hash of the content of a file; of a large file, of one MiB of it."""
    stat = path.stat()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if stat.st_size <= _WHOLE:
            digest.update(file.read())
        else:
            for part in range(4):
                file.seek((stat.st_size - _BLOCK) * part // 3)
                digest.update(file.read(_BLOCK))
    return f"{stat.st_size} {stat.st_mtime_ns} {digest.hexdigest()[:16]}"


def listing_print(paths: Iterable[Path]) -> str:
    """Returns a hash of the names and contents of files, and of all files in folders, behind links as well.

    If one of them cannot be read, the result begins with ``UNPROVEN``.
    """
    try:
        listed = call_for_files(_files_at, list(paths), LOOK_TIMEOUT)
        files = [file for found in listed for file in found or ()]
        lines = []
        for file, line in zip(files, call_for_files(_line_of, files, LOOK_TIMEOUT, at_once=16), strict=True):
            if line is None:
                return f"{UNPROVEN}{file}: cannot be read"
            lines.append(line)
    except ReadTimeoutError as error:
        return f"{UNPROVEN}{error}"
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _files_at(path: Path) -> list[Path]:
    return sorted(_files_below(path)) if path.is_dir() else [path]


def _line_of(file: Path) -> str:
    """Returns the name and the content of a file; what is no ordinary file, such as a pipe, is not opened."""
    return f"{file.as_posix()} {file_print(file) if file.is_file() else 'missing'}"


def _files_below(folder: Path) -> Iterator[Path]:
    """Yields the files below a folder, following links to folders, each folder once."""
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(here, name) for name in files)


def code_prints(class_path: str) -> dict[str, str]:
    """Fingerprints the module of a class and every module that it imports, except installed ones.

    Args:
        class_path: Dotted path of a class, as ``class_path`` of a YAML file has it.

    Returns:
        ``code MODULE`` to the hash of its file; empty if the class belongs to an installed package.
    """
    prints: dict[str, str] = {}
    waiting = [class_path.rpartition(".")[0]]
    while waiting:
        name = waiting.pop()
        for spec in _specs(name):
            key = f"code {spec.name}"
            if key in prints or spec.origin is None or _installed(Path(spec.origin)):
                continue
            file = Path(spec.origin)
            prints[key] = content_sha(file)
            if file.suffix != ".py":
                prints[key] = f"{UNPROVEN}{file} is not Python source, so that its imports are not known"
                continue
            tree = ast.parse(file.read_text(encoding="utf-8"))
            if caller := next(_calls_by_name(tree), None):
                prints[key] = f"{UNPROVEN}{file} loads code by {caller}()"
            package = spec.name if spec.submodule_search_locations is not None else spec.name.rpartition(".")[0]
            waiting += _imports(tree, package)
    return prints


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Yields the names of modules that a module of ``package`` imports; a name may be one within a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _calls_by_name(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            # A method of another object may be called eval, such as that of a torch module.
            if name in _LOADS_BY_NAME and (isinstance(node.func, ast.Name) or name not in ("exec", "eval")):
                yield name


def _specs(name: str) -> Iterator[ModuleSpec]:
    """Yields the specs of the packages that hold a module, and its own, without importing any of them."""
    places: list[str] | None = None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        # by its last part: a folder without __init__.py would look for its parent among the modules that are imported
        spec = PathFinder.find_spec(parts[depth - 1], places)
        if spec is None or (depth == 1 and spec.name in ("vidreason", *sys.stdlib_module_names)):
            return
        spec.name = ".".join(parts[:depth])
        yield spec
        if spec.submodule_search_locations is None:
            return
        places = list(spec.submodule_search_locations)


_LIBRARIES = {"site-packages", "dist-packages"}
"""Also those of the user, and of the system below a virtual environment, are installed packages."""


def _installed(file: Path) -> bool:
    libraries = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return not libraries.isdisjoint(file.parents) or not _LIBRARIES.isdisjoint(file.parts)
