"""Reads the rows of a manifest: CSV, JSON lines, or folders named by label."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from vidreason.datamodules.clips.time_limit import NO_FILE, WALK_TIMEOUT, call_reader, look_at
from vidreason.datamodules.sources.folders import read_layout

REQUIRED_COLUMNS = ("path", "label")
TABLE_SUFFIXES = (".csv", ".jsonl")


@dataclass(frozen=True)
class Row:
    """One line of a manifest, or one file of a folder."""

    place: str
    """``row 12`` (as an editor counts lines), or the file's path within the folder."""
    values: Mapping[str, str]

    def get(self, column: str) -> str:
        """Returns the stripped value of a column; empty if there is none."""
        return self.values.get(column, "").strip()


@dataclass(frozen=True)
class Table:
    """The rows of a manifest, and all columns that occur in them."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def read_table(manifest: Path) -> Table:
    """Reads a manifest.

    Args:
        manifest: A ``.csv`` or ``.jsonl`` file, or a folder ``<class>/<clip>``, ``<split>/<class>/<clip>`` or
            ``<class>/<split>/<clip>``.

    Raises:
        ValueError: If the manifest is missing, of another kind, malformed or empty, or lacks a column.
    """
    kind = look_at(manifest)
    if kind == "folder":
        table = _read_folder(manifest)
    elif kind == "other":
        raise ValueError(f"{manifest}: {NO_FILE}")
    elif kind is None:
        raise ValueError(f"{manifest}: no such manifest (a .csv or .jsonl file, or a folder with one folder per class)")
    else:
        if manifest.suffix.lower() not in TABLE_SUFFIXES:
            raise ValueError(f"{manifest}: a manifest ends in .csv or .jsonl, or is a folder")
        try:
            table = read_delimited(manifest) if manifest.suffix.lower() == ".csv" else table_of(read_records(manifest))
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


def stream_rows(manifest: Path) -> Iterator[Row]:
    """Yields the rows of a ``.csv`` or ``.jsonl`` manifest, which is never held as a whole.

    Raises:
        ValueError: If the manifest is missing, no file, malformed, or has no column ``path``.
    """
    kind = look_at(manifest)
    if kind != "file":
        raise ValueError(f"{manifest}: {'no such manifest' if kind is None else NO_FILE}")
    is_csv = manifest.suffix.lower() == ".csv"
    try:
        with manifest.open(newline="" if is_csv else "\n", encoding="utf-8-sig") as file:
            if is_csv:
                header, rows = _delimited(manifest, file, ",")
                if "path" not in header:
                    raise ValueError(f"{manifest}: no column 'path'; there are {', '.join(header) or 'none'}")
                yield from rows
            else:
                yield from map(_row_of, _json_lines(manifest, file))
    except UnicodeDecodeError as error:
        raise ValueError(f"{manifest}: is not UTF-8: {error}") from error


@dataclass(frozen=True)
class Record:
    """One object of a JSON file."""

    place: str
    """``row 12``: the line of a JSONL file, or the number of the object in a list."""
    content: Mapping[str, Any]


def read_delimited(manifest: Path, delimiter: str = ",", encoding: str = "utf-8-sig") -> Table:
    """Reads a table with a header, such as CSV; a byte order mark is skipped.

    Raises:
        ValueError: If the file is malformed; the message names file and row.
        UnicodeDecodeError: If it has another encoding.
    """
    with manifest.open(newline="", encoding=encoding) as file:
        header, rows = _delimited(manifest, file, delimiter)
        return Table(header, tuple(rows))


def _delimited(manifest: Path, file: TextIO, delimiter: str) -> tuple[tuple[str, ...], Iterator[Row]]:
    """Returns the names of the columns, and the rows as they are asked for."""
    reader = csv.reader(file, strict=True, delimiter=delimiter)
    lines = _naming_row(manifest, reader)
    header = tuple(name.strip() for name in next(lines, []))
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ValueError(f"{manifest}, row 1: the column {twice[0]!r} occurs twice")
    return header, _csv_rows(manifest, reader, lines, header)


def _naming_row(manifest: Path, reader: Any) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(f"{manifest}, row {reader.line_num}: {error}") from error


def _csv_rows(manifest: Path, reader: Any, lines: Iterator[list[str]], header: Sequence[str]) -> Iterator[Row]:
    for values in lines:
        if not values:
            continue
        if len(values) != len(header):
            raise ValueError(
                f"{manifest}, row {reader.line_num}: {len(values)} values for {len(header)} columns; "
                "put quotes around a value that holds a comma"
            )
        yield Row(f"row {reader.line_num}", dict(zip(header, values, strict=True)))


def read_records(manifest: Path) -> tuple[Record, ...]:
    """Reads one JSON object a line, or from ``.json`` a list of objects.

    Raises:
        ValueError: If the file is malformed; the message names file and row.
        UnicodeDecodeError: If it is not UTF-8.
    """
    with manifest.open(encoding="utf-8-sig", newline="\n") as file:
        if manifest.suffix.lower() != ".json":
            return tuple(_json_lines(manifest, file))
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{manifest}: not JSON: {error}") from error
    if not isinstance(content, list):
        raise ValueError(f"{manifest}: not a list of objects with the keys path and label")
    return tuple(_record(manifest, number, item) for number, item in enumerate(content, start=1))


def _json_lines(manifest: Path, lines: Iterable[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{manifest}, row {number}: not JSON: {error}") from error
        yield _record(manifest, number, item)


def _record(manifest: Path, number: int, item: object) -> Record:
    if not isinstance(item, dict):
        raise ValueError(f"{manifest}, row {number}: not an object with the keys path and label")
    return Record(f"row {number}", item)


def table_of(records: Sequence[Record]) -> Table:
    """Returns the objects as rows: keys are columns, and values that are not strings are written as JSON."""
    columns: dict[str, None] = {}
    for record in records:
        columns.update(dict.fromkeys(record.content))
    return Table(tuple(columns), tuple(map(_row_of, records)))


def _row_of(record: Record) -> Row:
    return Row(record.place, {key: _as_text(value) for key, value in record.content.items()})


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _read_folder(folder: Path) -> Table:
    """Reads one folder per class, optionally with one folder per split above or below it."""
    layout = call_reader(read_layout, folder, timeout=WALK_TIMEOUT)
    for home in layout.empty:
        raise ValueError(f"{home}: a class folder without clips; begin its name with _ to have it passed over")
    rows = []
    for clip in layout.clips:
        path = clip.path.relative_to(folder).as_posix()
        rows.append(Row(path, {"path": path, "label": clip.label} | ({"split": clip.split} if clip.split else {})))
    has_splits = any(clip.split for clip in layout.clips)
    return Table(("path", "label", "split") if has_splits else REQUIRED_COLUMNS, tuple(rows))
