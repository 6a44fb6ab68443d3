"""Finds the columns of a table whose names are not known in advance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from vidreason.datamodules.sources.folders import VIDEO_SUFFIXES
from vidreason.datamodules.sources.rows import Table
from vidreason.datamodules.split_names import is_split_name
from vidreason.spelling import nearest

_PATH_NAMES = (
    *("path", "video", "video_path", "file", "filename", "file_name", "filepath", "file_path", "clip", "clip_path"),
    *("clip_name", "video_name", "video_file", "videos", "uri", "relpath", "video_id", "youtube_id", "name", "id"),
)
_LABEL_NAMES = (
    *("label", "class", "category", "action", "target", "class_name", "label_name", "labels", "answer", "activity"),
    *("verb", "event", "ground_truth", "gt", "tag", "emotion", "y"),
)
_SPLIT_NAMES = ("split", "subset", "set", "partition", "phase", "usage")
_SAMPLE = 500  # rows that a guess looks at


@dataclass(frozen=True)
class ColumnNames:
    """Names of columns that the user gave; a column that is None is guessed."""

    path: str | None = None
    label: str | None = None
    split: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Columns:
    """The columns of one table."""

    path: str
    label: str | None
    split: str | None
    group: str | None
    guessed: tuple[str, ...]
    """One sentence about each column that was guessed."""


def find_columns(table: Table, asked: ColumnNames, name: str, label_needed: bool = True) -> Columns:
    """Returns the columns that the user named, and guesses the others by name and content.

    Args:
        table: All rows.
        asked: The columns that the user named.
        name: Name of the table in messages.
        label_needed: Whether a table without a column of labels is refused.

    Raises:
        ValueError: If a named column does not exist, or the column of paths or labels cannot be guessed.
    """
    for option, wanted in (
        ("path", asked.path),
        ("label", asked.label),
        ("split", asked.split),
        ("group", asked.group),
    ):
        if wanted is not None and wanted not in table.columns:
            raise ValueError(
                f"{name}: --{option}-column {wanted}: no such column{_suggestion(wanted, table.columns)}; "
                f"there are {', '.join(table.columns)}"
            )
    if any(PurePath(column).suffix.lower() in VIDEO_SUFFIXES for column in table.columns):
        raise ValueError(f"{name}, row 1: a clip and not the names of columns; put a line such as path,label on top")
    path = asked.path or _guess_path(table, name)
    split = asked.split or _guess_split(table, taken=(path, asked.label))
    group = asked.group or next((column for column in table.columns if _plain(column) == "group"), None)
    label = asked.label or _guess_label(table, (path, split, group), name, label_needed)
    chosen = {"path": path, "label": label, "split": split, "group": group}
    named = {"path": asked.path, "label": asked.label, "split": asked.split, "group": asked.group}
    guessed = tuple(
        f"{what}: column {column!r}, guessed; --{what}-column names another"
        for what, column in chosen.items()
        if column is not None and named[what] is None and column != what
    )
    return Columns(path, label, split, group, guessed)


def _guess_path(table: Table, name: str) -> str:
    named = _by_name(table.columns, _PATH_NAMES)
    like_clips = [column for column in table.columns if _share_of_clips(table, column) >= 0.5]
    for column in (*(column for column in named if column in like_clips), *like_clips, *named):
        return column
    raise ValueError(
        f"{name}: no column looks like the path of a clip; name it with --path-column "
        f"(there are {', '.join(table.columns) or 'none'})"
    )


def _guess_split(table: Table, taken: Sequence[str | None]) -> str | None:
    """Returns a column named split, or one with a usual name that contains only names of splits."""
    for column in _by_name(table.columns, _SPLIT_NAMES):
        values = {row.get(column) for row in table.rows} - {""}
        if column not in taken and values and (_plain(column) == "split" or all(map(is_split_name, values))):
            return column
    return None


def _guess_label(table: Table, taken: Sequence[str | None], name: str, needed: bool) -> str | None:
    """Returns a column by name (words before numbers), else the only one whose values repeat or the only one left."""
    free = [column for column in table.columns if column not in taken]
    named = _by_name(free, _LABEL_NAMES)
    for column in (*(column for column in named if not _is_numeric(table, column)), *named):
        return column
    repeating = [column for column in free if _repeats(table, column)]
    for only in (repeating, free):
        if len(only) == 1:
            return only[0]
    if not needed:
        return None
    raise ValueError(
        f"{name}: which column is the label? Name it with --label-column (there are {', '.join(free) or 'no others'})"
    )


def _by_name(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns the columns with one of the names, in the order of the names."""
    return sorted((column for column in columns if _plain(column) in names), key=lambda c: names.index(_plain(c)))


def _plain(column: str) -> str:
    return column.strip().casefold().replace(" ", "_").replace("-", "_")


def _values(table: Table, column: str) -> list[str]:
    return [value for row in table.rows[:_SAMPLE] if (value := row.get(column))]


def _share_of_clips(table: Table, column: str) -> float:
    values = _values(table, column)
    found = sum(PurePath(value.rstrip('"]')).suffix.lower() in VIDEO_SUFFIXES for value in values)
    return found / len(values) if values else 0.0


def _is_numeric(table: Table, column: str) -> bool:
    return all(value.replace(".", "", 1).lstrip("-").isdecimal() for value in _values(table, column))


def _repeats(table: Table, column: str) -> bool:
    values = _values(table, column)
    return not _is_numeric(table, column) and 2 <= len(set(values)) <= len(values) / 2


def _suggestion(column: str, columns: Sequence[str]) -> str:
    near = nearest(column, columns, cutoff=0.5)
    return "" if near is None else f" (did you mean {near!r}?)"
