"""Reads a data source in any layout: folders, a table with columns of any name, or chat records.

No clip is opened here; ``probing.py`` does that.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vidreason.datamodules.clips.sampling import Stretch
from vidreason.datamodules.clips.time_limit import NO_FILE, WALK_TIMEOUT, call_reader, look_at
from vidreason.datamodules.sources.chat_records import holds_chats, table_of_chats
from vidreason.datamodules.sources.columns import ColumnNames, Columns, find_columns
from vidreason.datamodules.sources.folders import VIDEO_SUFFIXES, Layout, read_layout
from vidreason.datamodules.sources.rows import Row, Table, read_delimited, read_records, table_of
from vidreason.datamodules.sources.stretches import STRETCH_COLUMNS, name_of, stretch_of
from vidreason.datamodules.sources.table_paths import absolute, locator, path_of
from vidreason.datamodules.split_names import standard_split

_DELIMITERS = (",", ";", "\t", "|")
_FALLBACK_ENCODING = "cp1252"  # the encoding of spreadsheet programs that do not write UTF-8


@dataclass(frozen=True)
class SourceClip:
    """One clip as the source describes it."""

    file: Path
    """Absolute path, with links not resolved; the file may be missing."""
    name: str
    """Id of the clip: the path within the folder, or the table's ``video_id`` or path."""
    label: str
    split: str = ""
    group: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    """All other columns."""
    place: str = ""
    """``row 12``, or the path within the folder."""
    stretch: Stretch | None = None
    """The part of the video that the clip is; None is all of it."""


@dataclass(frozen=True)
class Source:
    """A source that was read."""

    path: Path
    kind: str
    """Format that was detected."""
    clips: tuple[SourceClip, ...]
    notes: tuple[str, ...] = ()
    """One sentence about each guess and each skipped row or file."""
    question: str = ""
    """The question of the chat records, if all are the same."""


@dataclass(frozen=True)
class SourceOptions:
    """Options of a source that the user specified.

    Args:
        columns: Names of columns.
        root: Folder that paths in a table are relative to; None tries the table's folder and the current folder.
        where: Values of columns that rows must have.
        as_listed: Keeps every row of a table, also without a label or path, and repeated ones; for checking it.
    """

    columns: ColumnNames = ColumnNames()
    root: Path | None = None
    where: Mapping[str, str] = field(default_factory=dict)
    as_listed: bool = False


def read_source(path: Path, options: SourceOptions | None = None) -> Source:
    """Reads a folder, a table (``.csv .tsv .txt .json .jsonl``) or chat records (``.json .jsonl``).

    Raises:
        ValueError: If something is missing, malformed or contradictory; the message names file and row.
    """
    options = options or SourceOptions()
    kind = look_at(path)
    if kind == "folder":
        if options.columns != ColumnNames() or options.where or options.root:
            raise ValueError(f"{path}: a folder has no columns; --*-column, --where and --root are for tables")
        source = _from_layout(path, call_reader(read_layout, path, timeout=WALK_TIMEOUT))
    elif kind is None:
        raise ValueError(f"{path}: no such file or folder")
    elif kind == "other":
        raise ValueError(f"{path}: {NO_FILE}")
    elif path.suffix.lower() in VIDEO_SUFFIXES:
        raise ValueError(
            f"{path}: a clip; give a folder with one folder of clips per class, or a table that lists clips"
        )
    else:
        source = _from_file(path, options)
    if not source.clips:
        raise ValueError(f"{path}: lists no clips")
    return source if options.as_listed else _once_each(source)


def _from_layout(folder: Path, layout: Layout) -> Source:
    clips = []
    for clip in layout.clips:
        name = clip.path.relative_to(folder).as_posix()
        clips.append(SourceClip(absolute(clip.path), name, _label(clip.label), standard_split(clip.split), place=name))
    notes = []
    if layout.home != folder:
        notes.append(f"classes are looked for in {layout.home}, the only folder in {folder}")
    if layout.passed_over:
        notes.append(f"no classes, as their names begin with _ or a dot: {_names(layout.passed_over, folder)}")
    if layout.empty:
        notes.append(f"no classes, as there are no clips in them: {_names(layout.empty, folder)}")
    if layout.inner:
        notes.append(
            f"folders within a class, counted as it: {_names(layout.inner, folder)} (where these are the classes, give "
            "the folder they are in)"
        )
    if layout.loose:
        notes.append(f"left out, as they lie in no class folder: {_names(layout.loose, folder)}")
    if layout.others:
        kinds = ", ".join(f"{n} {suffix}" for suffix, n in sorted(layout.others.items(), key=lambda item: -item[1])[:6])
        notes.append(f"left out, as they are no clips by their names: {kinds}")
    if not clips and layout.others:
        raise ValueError(
            f"{folder}: no clips in its folders, only {kinds}; pictures of one clip go into a folder or .zip, "
            "and a manifest may name files of any kind"
        )
    notes += [f"{folder / name} is not used; give it as SOURCE if it says more" for name in _manifests(folder)]
    return Source(folder, f"folders {layout.pattern}", tuple(clips), tuple(notes))


def _manifests(folder: Path) -> list[str]:
    return sorted(
        path.name for path in folder.iterdir() if path.suffix.lower() in (".csv", ".jsonl") and path.is_file()
    )


def _from_file(path: Path, options: SourceOptions) -> Source:
    suffix = path.suffix.lower()
    notes: list[str] = []
    question = ""
    if suffix in (".json", ".jsonl", ".ndjson"):
        try:
            records = read_records(path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8: {error}") from error
        if holds_chats(records):
            chats = table_of_chats(records, str(path))
            table, question, kind = chats.table, chats.question, "chat records"
        else:
            table, kind = table_of(records), "JSON objects"
    elif suffix in (".csv", ".tsv", ".txt"):
        table, kind = _read_text_table(path)
    else:
        raise ValueError(f"{path}: neither a folder nor a table (.csv, .tsv, .txt, .json, .jsonl)")
    columns = find_columns(table, options.columns, str(path), label_needed=not options.as_listed)
    notes += columns.guessed
    rows = _select(table, options.where, path)
    for what, column in () if options.as_listed else (("path", columns.path), ("label", columns.label)):
        _check_none(path, f"no {what} (column {column!r})", [row.place for row in rows if not row.get(column or "")])
    if columns.split is not None:
        blank = [row.place for row in rows if not row.get(columns.split)]
        if len(blank) < len(rows) and not options.as_listed:
            _check_none(path, f"no split (column {columns.split!r}), though other rows have one", blank)
    locate, where_from = locator(path, [row.get(columns.path) for row in rows], options.root)
    notes += where_from
    return Source(path, kind, tuple(_clip(row, columns, locate, path) for row in rows), tuple(notes), question)


def _read_text_table(path: Path) -> tuple[Table, str]:
    content = path.read_bytes()
    encoding, remark = "utf-8-sig", ""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    else:
        try:
            content.decode(encoding)
        except UnicodeDecodeError:
            encoding, remark = _FALLBACK_ENCODING, ", read as Windows-1252 since it is not UTF-8"
    try:
        header = content.decode(encoding).partition("\n")[0]
        # More robust than csv.Sniffer, which guesses from all characters of the file.
        delimiter = max(_DELIMITERS, key=header.count)
        table = read_delimited(path, delimiter, encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: neither UTF-8 nor Windows-1252 ({error}); save it as UTF-8") from error
    name = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}[delimiter]
    return table, f"a table with {name}{remark}"


def _select(table: Table, where: Mapping[str, str], path: Path) -> Sequence[Row]:
    rows: Sequence[Row] = table.rows
    for column, value in where.items():
        if column not in table.columns:
            raise ValueError(f"{path}: --where {column}={value}: no such column; there are {', '.join(table.columns)}")
        seen = sorted({row.get(column) for row in rows})
        rows = [row for row in rows if row.get(column) == value]
        if not rows:
            raise ValueError(f"{path}: --where {column}={value}: no such row; the column has {', '.join(seen[:20])}")
    if not rows:
        raise ValueError(f"{path}: lists no clips")
    return rows


def _clip(row: Row, columns: Columns, locate: Callable[[str], Path], table: Path) -> SourceClip:
    path = path_of(row.get(columns.path))
    known = {columns.path, columns.label, columns.split, columns.group, "video_id", *STRETCH_COLUMNS}
    try:
        stretch = stretch_of(row)
    except ValueError as error:
        raise ValueError(f"{table}: {row.place}: {error}") from error
    return SourceClip(
        file=locate(path),
        name=row.get("video_id") or name_of(path, stretch),
        label=_label(row.get(columns.label)) if columns.label else "",
        split=standard_split(row.get(columns.split)) if columns.split else "",
        group=row.get(columns.group) if columns.group else "",
        fields={key: value for key, value in row.values.items() if key not in known},
        place=row.place,
        stretch=stretch,
    )


def _once_each(source: Source) -> Source:
    """Removes repeated rows about the same file, or the same part of it.

    Raises:
        ValueError: If they contradict each other.
    """
    first: dict[tuple[Path, Stretch | None], SourceClip] = {}
    twice: list[str] = []
    for clip in source.clips:
        other = first.setdefault((clip.file, clip.stretch), clip)
        if other is clip:
            continue
        for what in ("label", "split", "group"):
            mine, others = getattr(clip, what), getattr(other, what)
            if mine != others:
                raise ValueError(
                    f"{source.path}: {clip.name} has two {what}s: {others!r} in {other.place} and {mine!r} in "
                    f"{clip.place}; a clip has one: correct or remove a row"
                )
        twice.append(f"{clip.name} ({other.place}, {clip.place})")
    names: dict[str, SourceClip] = {}
    for clip in first.values():
        other = names.setdefault(clip.name, clip)
        if other is not clip:
            raise ValueError(
                f"{source.path}: video_id {clip.name!r} stands for two files, in {other.place} and {clip.place}; "
                "give each its own"
            )
    notes = [*source.notes, f"listed more than once and taken once: {_first(twice)}"] if twice else source.notes
    return Source(source.path, source.kind, tuple(first.values()), tuple(notes), source.question)


def _label(text: str) -> str:
    # macOS may store names of folders in another normal form than editors write.
    return unicodedata.normalize("NFC", text.strip())


def _names(paths: Iterable[Path], folder: Path) -> str:
    return _first([path.relative_to(folder).as_posix() for path in paths])


def _first(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _check_none(path: Path, what: str, places: Sequence[str]) -> None:
    if places:
        raise ValueError(f"{path}: {what}: {_first(places, 5)}; fill it in or remove these rows")
