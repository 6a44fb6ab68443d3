"""The rows of a manifest, however it is written: CSV, JSONL, or folders whose names are the labels."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp", ".gif", ".zip")
)
"""What counts as a clip in a folder per class; a manifest may name any file."""

REQUIRED_COLUMNS = ("path", "label")


@dataclass(frozen=True)
class Row:
    """One line of a manifest, or one file of a folder."""

    place: str
    """``row 12`` (as an editor counts lines), or the file's path within the folder."""
    values: Mapping[str, str]

    def get(self, column: str) -> str:
        """The value of a column without white space around it; empty where there is none."""
        return self.values.get(column, "").strip()


@dataclass(frozen=True)
class Table:
    """All rows, with the columns that any of them has."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def read_table(manifest: Path) -> Table:
    """Reads a manifest.

    Args:
        manifest: a ``.csv`` or ``.jsonl`` file, or a folder ``<class>/<clip>`` or ``<split>/<class>/<clip>``.

    Raises:
        ValueError: naming the file and row, where it is missing, of another kind, malformed, empty, or lacks a column.
    """
    if manifest.is_dir():
        table = _read_folder(manifest)
    elif not manifest.is_file():
        raise ValueError(f"{manifest}: no such manifest (a .csv or .jsonl file, or a folder with one folder per class)")
    else:
        readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
        if manifest.suffix.lower() not in readers:
            raise ValueError(f"{manifest}: a manifest ends in .csv or .jsonl, or is a folder")
        try:
            table = readers[manifest.suffix.lower()](manifest)
        except UnicodeDecodeError as error:
            raise ValueError(f"{manifest}: is not UTF-8: {error}") from error
    missing = [column for column in REQUIRED_COLUMNS if column not in table.columns]
    if missing:
        raise ValueError(
            f"{manifest}: no column {' and no column '.join(map(repr, missing))}; "
            f"there are {', '.join(table.columns) or 'none'} (wanted: path, label; optional: split, group, video_id)"
        )
    if not table.rows:
        raise ValueError(f"{manifest}: lists no clips")
    return table


def _read_csv(manifest: Path) -> Table:
    with manifest.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(lines, [])]
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise ValueError(f"{manifest}, row 1: the column {twice[0]!r} occurs twice")
            return Table(tuple(header), tuple(_csv_rows(manifest, lines, header)))
        except csv.Error as error:
            raise ValueError(f"{manifest}, row {lines.line_num}: {error}") from error


def _csv_rows(manifest: Path, lines: Any, header: Sequence[str]) -> Iterator[Row]:
    for values in lines:
        if not values:
            continue
        if len(values) != len(header):
            raise ValueError(
                f"{manifest}, row {lines.line_num}: {len(values)} values for {len(header)} columns; "
                "put quotes around a value that holds a comma"
            )
        yield Row(f"row {lines.line_num}", dict(zip(header, values, strict=True)))


def _read_jsonl(manifest: Path) -> Table:
    rows: list[Row] = []
    columns: dict[str, None] = {}
    for number, line in enumerate(manifest.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{manifest}, row {number}: not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{manifest}, row {number}: not an object with the keys path and label")
        rows.append(Row(f"row {number}", {key: _as_text(value) for key, value in content.items()}))
        columns.update(dict.fromkeys(content))
    return Table(tuple(columns), tuple(rows))


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _read_folder(folder: Path) -> Table:
    """One folder per class, or one per split with one per class in each."""
    tops = _folders(folder)
    if not tops:
        raise ValueError(f"{folder}: holds no folders; expected one per class, or a .csv or .jsonl manifest")
    has_splits = any(top.name == "train" for top in tops) and all(_folders(top) and not _clips(top) for top in tops)
    homes = (
        [(top.name, inner) for top in tops for inner in _folders(top)] if has_splits else [("", top) for top in tops]
    )
    rows = []
    for split, home in homes:
        clips = clips_below(home)
        if not clips:
            raise ValueError(f"{home}: a class folder without clips; begin its name with _ to have it passed over")
        for clip in clips:
            path = clip.relative_to(folder).as_posix()
            rows.append(Row(path, {"path": path, "label": home.name} | ({"split": split} if split else {})))
    return Table(("path", "label", "split") if has_splits else REQUIRED_COLUMNS, tuple(rows))


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(("_", ".")))


def clips_below(folder: Path) -> list[Path]:
    """Every video file of a folder, of any depth, sorted; nothing hidden, nothing in folders that begin with "_"."""
    return sorted(path for path in folder.rglob("*") if _is_clip(path, folder))


def _clips(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _is_clip(path, folder)]


def _is_clip(path: Path, home: Path) -> bool:
    hidden = any(part.startswith(("_", ".")) for part in path.relative_to(home).parts[:-1]) or path.name.startswith(".")
    return path.suffix.lower() in VIDEO_SUFFIXES and path.is_file() and not hidden
