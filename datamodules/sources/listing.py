"""Lists clips one after the other: given files, everything below folders, and the rows of manifests.

Of the rows of a manifest 16 bytes each are kept while they are checked, and of a folder its names while it is listed.
Nothing here imports torch.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.datamodules.clips.mounts import Lookout
from vidreason.datamodules.clips.sampling import Stretch
from vidreason.datamodules.clips.time_limit import WALK_TIMEOUT, ReadStoppedError, call_reader
from vidreason.datamodules.key_set import KeySet, key_of
from vidreason.datamodules.sources.folders import PICTURE_SUFFIXES, VIDEO_SUFFIXES
from vidreason.datamodules.sources.rows import TABLE_SUFFIXES, stream_rows
from vidreason.datamodules.sources.stretches import STRETCH_COLUMNS, name_of, stretch_of
from vidreason.datamodules.sources.table_paths import spellings

_NO_FIELDS = ("path", "label", "split", "group", *STRETCH_COLUMNS)
_BARE = "files without a suffix"
_MOST_NAMED = 20
_MOST_KINDS = 1000


@dataclass(frozen=True)
class ListedClip:
    """A clip that is to be decided."""

    path: Path
    name: str
    """The path as it was given, or as it stands in the manifest, with the part of the video. Among several manifests,
    whose paths may be the same, the folder that they are relative to stands before it."""
    stretch: Stretch | None = None
    """The part of the video; None is all of it."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Further columns of the manifest; the prompt shows those that the task lists."""
    where: str = ""
    """Location of the row in its manifest, for messages."""


@dataclass
class Listing:
    """Clips of files, folders and manifests.

    Args:
        places: Clips, folders of clips, and ``.csv`` or ``.jsonl`` manifests with a column ``path``.
        root: Folder that paths in manifests are relative to; None is that of the manifest.
        lookout: Remembers mounts that do not answer.
    """

    places: Sequence[Path]
    root: Path | None = None
    lookout: Lookout = field(default_factory=Lookout)
    total: int | None = 0
    """Number of clips, after ``clips`` was called; None if there are folders, which are listed as they are needed."""
    others: Counter[str] = field(default_factory=Counter)
    """Counts of entries that are no clips in the folders listed so far, by file suffix (``.txt``) or by name and
    reason (``a.fifo (not a regular file)``)."""

    def clips(self) -> Iterator[ListedClip]:
        """Returns the clips in order.

        Each place is looked at, and each manifest read through once, before the first clip is returned.

        Raises:
            ValueError: If a folder has no clip, or a manifest is malformed. A file that is missing or does not answer
                is listed; reading it will say so.
            OSError: If a folder or manifest cannot be opened.
        """
        parts = []
        for place in self.places:
            part = self._clips_of(place)
            parts.append(chain([next(part)], part))
        return chain.from_iterable(parts)

    def _clips_of(self, place: Path) -> Iterator[ListedClip]:
        table = place.suffix.lower() in TABLE_SUFFIXES
        try:
            kind = self.lookout.look(place)
        except ReadStoppedError:
            raise
        except (DecodeError, OSError):
            if table:
                raise
            kind = None
        if kind == "folder":
            self.total = None
            found = False
            for path in self._below(place, KeySet()):
                found = True
                yield ListedClip(path, os.fspath(path))
            if not found:
                raise ValueError(f"{place}: no clip in this folder")
        elif table:
            rows = sum(1 for _ in self._rows(place, check=True))
            if not rows:
                raise ValueError(f"{place}: lists no clips")
            self._count(rows)
            yield from self._rows(place, check=False)
        else:
            self._count(1)
            yield ListedClip(place, os.fspath(place))

    def _count(self, number: int) -> None:
        self.total = None if self.total is None else self.total + number

    def _rows(self, manifest: Path, check: bool) -> Iterator[ListedClip]:
        """Yields the clips of a manifest; a check looks for no file, but for rows that cannot be told apart.

        Raises:
            ValueError: If a row has no path or a wrong stretch or, in a check, the name of another clip.
        """
        root = self.root or manifest.parent
        names, rows = KeySet(), KeySet()
        for row in stream_rows(manifest):
            path = row.get("path")
            if not path:
                raise ValueError(f"{manifest}: no path: {row.place}")
            try:
                stretch = stretch_of(row)
            except ValueError as error:
                raise ValueError(f"{manifest}: {row.place}: {error}") from error
            shown = path if len(self.places) == 1 else os.fspath(root / path)
            name, where = name_of(shown, stretch), f"{manifest.name}, {row.place}"
            places = [root / text for text in (spellings(path) if not check else (path,))]
            there = next((place for place in places[1:] if self._is_there(places[0], place)), places[0])
            fields = {name: value for name, value in row.values.items() if name not in _NO_FIELDS and value.strip()}
            if check and rows.add(key_of(f"{name}\0{sorted(fields.items())}")) and not names.add(key_of(name)):
                raise ValueError(
                    f"{manifest}: {row.place}: {name} stands in an earlier row with other columns, and their decisions "
                    "could not be told apart: remove one of the rows"
                )
            yield ListedClip(there, name, stretch, fields, where)

    def _is_there(self, first: Path, other: Path) -> bool:
        """Returns whether a path is found by its other spelling only."""
        try:
            return self.lookout.look(first) is None and self.lookout.look(other) is not None
        except (DecodeError, OSError):
            return False

    def _below(self, folder: Path, seen: KeySet) -> Iterator[Path]:
        """Yields the clips below a folder, sorted; a folder to which several links lead is listed once."""
        try:
            if seen:
                self.lookout.look(folder)
            inside = call_reader(look_into, folder, timeout=WALK_TIMEOUT)
        except ReadStoppedError:
            raise
        except (DecodeError, OSError) as error:
            if not seen:
                raise
            reason = error.strerror if isinstance(error, OSError) else "no answer"
            self._pass_over({f"folder {folder.name} ({reason})": 1})
            return
        if not seen.add(key_of(inside.identity)):
            return
        self._pass_over(inside.others)
        if inside.is_clip:
            yield folder
        folders = set(inside.folders)
        for name in sorted([*inside.videos, *inside.folders]):
            if name in folders:
                yield from self._below(folder / name, seen)
            else:
                yield folder / name

    def _pass_over(self, found: Mapping[str, int]) -> None:
        for what, number in found.items():
            self.others[what if what in self.others or len(self.others) < _MOST_KINDS else "others"] += number

    def passed_over(self) -> str:
        """Returns what is passed over in the folders listed so far, in words; empty if there is nothing."""
        files = [what for what in sorted(self.others) if not what.startswith("folder ")]
        kinds = [*files, *sorted(set(self.others) - set(files))]
        told = [f"{self.others[what]} {what}" if what == _BARE else self._told(what) for what in kinds]
        more = len(told) - _MOST_NAMED
        return ", ".join(told[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")

    def _told(self, what: str) -> str:
        return what if " " in what else f"{self.others[what]} of {what}"


@dataclass(frozen=True)
class Inside:
    """The content of one folder."""

    identity: str
    """Device and inode of the folder as text, so that two links to one folder have the same identity."""
    is_clip: bool
    """True if the folder itself is a clip, with pictures as its frames: it holds pictures and no video."""
    videos: tuple[str, ...]
    """Names of the video files."""
    folders: tuple[str, ...]
    """Names of the folders to list next."""
    others: Mapping[str, int]
    """Counts of the files and folders that are no clips, as in ``Listing.others``."""


def look_into(folder: Path) -> Inside:
    """Returns the content of a folder; names that begin with ``.``, and folders with ``_``, are passed over.

    Raises:
        OSError: If it cannot be opened.
    """
    videos, pictures, folders = list[str](), Counter[str](), list[str]()
    files, others = Counter[str](), Counter[str]()
    with os.scandir(folder) as entries:
        for entry in entries:
            name, suffix = entry.name, Path(entry.name).suffix.lower()
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself, or behind a folder without permission
                is_folder = is_file = False
            if is_folder:
                if name.startswith(("_", ".")):
                    others[f"folder {name}"] += 1
                else:
                    folders.append(name)
            elif name.startswith("."):
                continue
            elif not is_file:  # a FIFO, a socket, a link that leads nowhere
                others[f"{name} (not a regular file)"] += 1
            elif suffix in VIDEO_SUFFIXES:
                videos.append(name)
            else:
                (pictures if suffix in PICTURE_SUFFIXES else files)[suffix or _BARE] += 1
    is_clip = bool(pictures) and not videos
    if not is_clip:
        others += files + pictures
    found = folder.stat()
    return Inside(f"{found.st_dev} {found.st_ino}", is_clip, tuple(videos), tuple(folders), others)
