"""Finds clips in folders: which folders are classes, which are splits, and what is skipped."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vidreason.datamodules.split_names import is_split_name, standard_split

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp", ".gif", ".zip")
    + (".mts", ".m2ts", ".ogv", ".3g2", ".vob", ".asf", ".f4v", ".mxf", ".apng")
)
"""Suffixes of clips in class folders, in lower case; a manifest may name any file."""
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
"""Suffixes of pictures, of which those in one folder are a clip."""


@dataclass(frozen=True)
class FolderClip:
    """One clip with the label and split of its folders."""

    path: Path
    label: str
    split: str = ""
    """Name of the split folder; empty if there is none."""


@dataclass(frozen=True)
class Layout:
    """Contents of a folder of clips."""

    home: Path
    """The folder with the classes or splits: the one given, or the only one below it."""
    pattern: str
    """``<class>/<clip>``, ``<split>/<class>/<clip>`` or ``<class>/<split>/<clip>``."""
    clips: tuple[FolderClip, ...]
    empty: tuple[Path, ...]
    """Class folders without clips."""
    passed_over: tuple[Path, ...]
    """Folders that were skipped because their names begin with ``_`` or ``.``."""
    loose: tuple[Path, ...]
    """Clips outside every class folder."""
    inner: tuple[Path, ...]
    """Folders inside class folders; their clips belong to that class."""
    others: Mapping[str, int] = field(default_factory=dict)
    """Number of files in class folders that are not clips, by suffix."""


def read_layout(folder: Path) -> Layout:
    """Finds the clips below a folder; opens none of them.

    Links to files and folders are followed. If a folder contains only one folder of folders, as after unpacking many
    archives, that one is read instead.

    Args:
        folder: Folder with one folder per class, optionally with folders for splits above or below the classes.

    Raises:
        ValueError: If there are no folders in it.
    """
    home = folder
    while len(tops := _folders(home)) == 1 and not _clips(home) and not _clips(tops[0]) and len(_folders(tops[0])) > 1:
        home = tops[0]
    if not tops:
        found = f"{len(_clips(home))} clips but no folders" if _clips(home) else "no folders"
        raise ValueError(f"{folder}: holds {found}; expected one per class, or a .csv or .jsonl manifest")
    pattern, homes = _class_folders(tops)
    clips: list[FolderClip] = []
    empty: list[Path] = []
    others: Counter[str] = Counter()
    hidden: list[Path] = []
    inner: dict[Path, None] = {}
    for place in homes:
        found_here, others_here, hidden_here = _sort_files(place.path, place.path)
        hidden += hidden_here
        others += others_here
        clips += [FolderClip(path, place.label, place.split) for path in found_here]
        deeper = (path.relative_to(place.path) for path in found_here)
        inner.update(dict.fromkeys(place.path / path.parts[0] for path in deeper if len(path.parts) > 1))
        if not found_here:
            empty.append(place.path)
    levels = [folder, home] if home != folder else [folder]
    levels += [top for top in tops if pattern != "<class>/<clip>"]
    passed_over = [path for level in levels for path in sorted(level.iterdir()) if _is_hidden(path) and path.is_dir()]
    loose = [path for level in levels for path in _clips(level)]
    return Layout(
        home, pattern, tuple(clips), tuple(empty), (*passed_over, *hidden), tuple(loose), tuple(inner), others
    )


def _sort_files(folder: Path, home: Path) -> tuple[list[Path], Counter[str], list[Path]]:
    """Returns the clips below a folder, the number of other files by suffix, and the folders that were skipped.

    What is no regular file is among the others by its name.
    """
    files, hidden, odd = _files_below(folder)
    clips = _clips_among(files, home)
    taken = set(clips)
    others = Counter(p.suffix.lower() or p.name for p in files if p not in taken and p.parent not in taken)
    others.update(f"{path.name} (not a regular file)" for path in odd)
    return clips, others, hidden


def _clips_among(files: Sequence[Path], home: Path) -> list[Path]:
    """Returns the videos and archives among files, and the folders below ``home`` that hold pictures but no videos."""
    videos = {path: None for path in files if path.suffix.lower() in VIDEO_SUFFIXES}
    with_videos = {path.parent for path in videos}
    folders = {path.parent for path in files if path.parent != home and path.suffix.lower() in PICTURE_SUFFIXES}
    return [*videos, *sorted(folders - with_videos)]


@dataclass(frozen=True)
class _ClassFolder:
    path: Path
    label: str
    split: str = ""


def _class_folders(tops: Sequence[Path]) -> tuple[str, list[_ClassFolder]]:
    """Returns the layout pattern and the class folders."""
    below = {top: _folders(top) for top in tops}
    nested = all(below[top] and not _clips(top) for top in tops)
    if nested and _are_splits(tops, below):
        return "<split>/<class>/<clip>", [_ClassFolder(c, c.name, top.name) for top in tops for c in below[top]]
    filled = [top for top in tops if below[top] or _clips(top)]
    if all(below[top] and not _clips(top) and all(is_split_name(c.name) for c in below[top]) for top in filled):
        places = [_ClassFolder(split, top.name, split.name) for top in filled for split in below[top]]
        bare = [_ClassFolder(top, top.name) for top in tops if top not in filled]
        return "<class>/<split>/<clip>", places + bare
    return "<class>/<clip>", [_ClassFolder(top, top.name) for top in tops]


def _are_splits(tops: Sequence[Path], below: Mapping[Path, Sequence[Path]]) -> bool:
    """Returns whether all have split names, or each has a class of a train folder (``train/run``, ``night/run``)."""
    if all(is_split_name(top.name) for top in tops):
        return True
    train = {c.name for top in tops if standard_split(top.name) == "train" for c in below[top]}
    return all(train & {c.name for c in below[top]} for top in tops)


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(("_", "."))


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _is_hidden(path))


def _clips(folder: Path) -> list[Path]:
    """Returns the clips directly in a folder."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file() and not path.name.startswith(".")
    )


def _files_below(home: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Returns all files below a folder except hidden ones, the folders that were skipped, and what is no regular file.

    A link to a parent folder is followed once.
    """
    found: list[Path] = []
    hidden: list[Path] = []
    odd: list[Path] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(home, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        hidden += [path for name in folders if _is_hidden(path := Path(place, name))]
        folders[:] = sorted(name for name in folders if not name.startswith(("_", ".")))
        shown = [Path(place, name) for name in files if not name.startswith(".")]
        found += [path for path in shown if path.is_file()]
        odd += [path for path in shown if not path.is_file()]  # a FIFO, a socket, a link that leads nowhere
    return sorted(found), sorted(hidden), sorted(odd)
