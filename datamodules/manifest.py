"""Data sets from a CSV or JSONL manifest, or from one folder per class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.clips.sampling import Stretch
from vidreason.datamodules.clips.time_limit import ReadTimeoutError, existing
from vidreason.datamodules.sources.rows import Row, Table, read_table
from vidreason.datamodules.sources.stretches import grouped_by_video, name_of, stretch_of
from vidreason.datamodules.sources.table_paths import on_windows_drive, spellings
from vidreason.datamodules.split_names import ALMOST_SPLITS
from vidreason.datamodules.splits import (
    DEFAULT_FRACTIONS,
    check_disjoint,
    complete_splits,
    first_five,
    limit_clips,
    make_splits,
)
from vidreason.datamodules.task import Task
from vidreason.datamodules.types import Clip
from vidreason.spelling import nearest

KNOWN_COLUMNS = ("path", "label", "split", "group", "video_id", "start", "end")
"""Columns with a fixed meaning; all others are metadata."""


class ManifestDataModule(VideoDataModule):
    """Clips listed in a manifest, or stored in one folder per class.

    A manifest has the columns ``path`` and ``label`` and optionally ``split``, ``group``, ``video_id``, ``start`` and
    ``end`` (a part of a video, in seconds) and metadata. The parts of a video are one group unless ``group`` is given.
    A folder holds ``<class>/<clip>``, ``<split>/<class>/<clip>`` or ``<class>/<split>/<clip>``; names that begin with
    ``_`` or ``.`` are skipped.
    Missing splits are made (seeded, stratified, disjoint in ``group``) and written to the run folder.

    Args:
        manifest: A ``.csv`` or ``.jsonl`` file, or a folder.
        task: The task file, from the current folder or the shipped configs; null takes the labels of the manifest.
        root: Folder that paths in the manifest are relative to; by default that of the manifest.
        where: Keeps the rows whose columns have these values, such as ``{subset: weizmann_silhouettes}``.
        limit: Largest number of clips of a split, balanced over classes, such as ``{train: 64}``.
        split_fractions: Shares of the splits that have to be made; by default val 0.15, cal 0.15, test 0.2. A split
            that is taken from train gets this share of train.
    """

    def __init__(
        self,
        manifest: str | Path,
        task: str | Path | None = None,
        root: str | Path | None = None,
        where: dict[str, str] | None = None,
        limit: dict[str, int] | None = None,
        split_fractions: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.manifest = Path(manifest)
        self.task_file = None if task is None else Path(task)
        self.root = None if root is None else Path(root)
        self.where = dict(where or {})
        self.limit = dict(limit or {})
        self.split_fractions = dict(DEFAULT_FRACTIONS if split_fractions is None else split_fractions)
        self._task: Task | None = None
        self._samples: dict[str, tuple[Clip, ...]] = {}

    @property
    def task(self) -> Task:
        """The task of the task file, or one made from the labels in the manifest.

        Raises:
            ValueError: If the manifest is invalid; the message names the file and row.
        """
        self._read()
        assert self._task is not None
        return self._task

    @property
    def label_names(self) -> tuple[str, ...]:
        """[C] class names in the order of the task."""
        return self.task.label_names

    def splits(self) -> tuple[str, ...]:
        """Returns the names of the splits that have clips."""
        self._read()
        return tuple(self._samples)

    def samples(self, split: str) -> Sequence[Clip]:
        """Returns the clips of a split, at most ``limit``; empty if there is no such split."""
        self._read()
        return self._samples.get(split, ())

    def setup(self, stage: str) -> None:
        """Reads the manifest and makes missing splits.

        Raises:
            ValueError: If the manifest is invalid; the message names the file and row.
        """
        self._read()
        super().setup(stage)

    def _read(self) -> None:
        """Reads the manifest on the first call; later calls do nothing."""
        if self._task is not None:
            return
        table = read_table(self.manifest)
        rows = self._select(table)
        self._check_none("no path", [row.place for row in rows if not row.get("path")])
        self._check_none("no label", [row.place for row in rows if not row.get("label")])
        task = self._load_task(rows)
        self._check_against(task, rows, table.columns)
        there = self._existing(rows)
        clips = grouped_by_video([self._clip(row, there) for row in rows], [row.get("path") for row in rows])
        self._check_clips(clips, there)
        splits, self._made = self._split(clips)
        self._samples = self._limited(splits)
        self._task = task

    def _select(self, table: Table) -> Sequence[Row]:
        """Returns the rows that match ``where``."""
        rows: Sequence[Row] = table.rows
        for column, value in self.where.items():
            if column not in table.columns:
                raise ValueError(
                    f"{self.manifest}: where names no column: {column!r}; there are {_list(table.columns)}"
                )
            seen = sorted({row.get(column) for row in rows})
            rows = [row for row in rows if row.get(column) == value]
            if not rows:
                raise ValueError(
                    f"{self.manifest}: where finds no row with {value!r} in {column!r}; it has {_list(seen)}"
                )
        return rows

    def _load_task(self, rows: Sequence[Row]) -> Task:
        if self.task_file is not None:
            return Task.from_yaml(self.task_file)
        labels = sorted({row.get("label") for row in rows})
        try:
            return Task.from_labels(self.manifest.stem, labels)
        except ValueError as error:
            raise ValueError(f"{self.manifest}: without a task file its labels are the classes: {error}") from error

    def _check_against(self, task: Task, rows: Sequence[Row], columns: Sequence[str]) -> None:
        """Checks that the task has all labels and the manifest all metadata columns of the task."""
        # Exact names only: a silently corrected label would hide errors in the manifest.
        names = task.label_names
        unknown = [row for row in rows if row.get("label") not in names]
        self._check_none(
            f"unknown label, the classes of {self.task_file} are {_list(names)}",
            [f"{row.place}: {row.get('label')!r}{_suggestion(row.get('label'), names)}" for row in unknown],
        )
        lacking = [name for name in task.metadata_fields if name not in columns]
        if lacking:
            raise ValueError(
                f"{self.manifest}: no column {_list(lacking)}, named by metadata_fields in {self.task_file}; "
                f"there are {_list(columns)}"
            )

    @cached_property
    def _clip_root(self) -> Path:
        return self.root or (self.manifest if self.manifest.is_dir() else self.manifest.parent)

    def _places(self, row: Row) -> list[Path]:
        """Returns the paths at which the clip of a row may be."""
        return [self._clip_root / text for text in spellings(row.get("path"))]

    def _existing(self, rows: Sequence[Row]) -> set[Path]:
        """Returns the places of clips at which there is a file or folder."""
        try:
            return existing((place for row in rows for place in self._places(row)), self.frames.timeout)
        except ReadTimeoutError as error:
            raise ValueError(
                f"{self.manifest}: {error}: repair the disk or network mount, or set root to where the clips are"
            ) from error

    def _clip(self, row: Row, there: Set[Path]) -> Clip:
        places = self._places(row)
        try:
            stretch = stretch_of(row)
        except ValueError as error:
            raise ValueError(f"{self.manifest}: {row.place}: {error}") from error
        return Clip(
            path=next((path for path in places if path in there), places[0]),
            label=row.get("label"),
            video_id=row.get("video_id") or name_of(row.get("path"), stretch),
            split=row.get("split"),
            group=row.get("group"),
            fields={name: value for name, value in row.values.items() if name not in KNOWN_COLUMNS},
            where=f"{self.manifest.name}, {row.place}",
            stretch=stretch,
        )

    def _check_clips(self, clips: Sequence[Clip], there: Set[Path]) -> None:
        """Checks for duplicate ids or files, missing files and misspelt standard split names."""
        counts = Counter(clip.video_id for clip in clips)
        twice = [clip for clip in clips if counts[clip.video_id] > 1]
        self._check_none("duplicate video_id", [f"{self._place(clip)}: {clip.video_id!r}" for clip in twice])
        homes: dict[tuple[Path, Stretch | None], Clip] = {}
        again = [(c, home) for c in clips if (home := homes.setdefault((c.path, c.stretch), c)) is not c]
        self._check_none(
            "the same file under two ids, so that test clips might be known from training",
            [f"{self._place(clip)}: {clip.path}, as in {self._place(home)}" for clip, home in again],
        )
        missing = [clip for clip in clips if clip.path not in there]  # reading refuses what is there but no clip
        self._check_none(
            f"missing file, looked for from {self.root or self.manifest.parent}",
            [f"{self._place(clip)}: {clip.path}{_windows_drive(clip)}" for clip in missing],
        )
        odd = [clip for clip in clips if clip.split.lower() in ALMOST_SPLITS]
        self._check_none(
            "misnamed split",
            [f"{self._place(clip)}: call {clip.split!r} {ALMOST_SPLITS[clip.split.lower()]!r}" for clip in odd],
        )

    def _split(self, clips: Sequence[Clip]) -> tuple[dict[str, tuple[Clip, ...]], tuple[str, ...]]:
        """Returns the clips by split and which splits were made: all if none is given, else missing val and cal."""
        try:
            if not any(clip.split for clip in clips):
                dealt = make_splits(clips, self.split_fractions, self.split_seed)
                splits, _ = complete_splits(dealt, self.split_fractions, self.split_seed)
                return splits, tuple(splits)
            blank = [clip for clip in clips if not clip.split]
            self._check_none("no split, though other rows have one", [self._place(clip) for clip in blank])
            given: dict[str, list[Clip]] = {}
            for clip in clips:
                given.setdefault(clip.split, []).append(clip)
            check_disjoint(given)
            return complete_splits(given, self.split_fractions, self.split_seed)
        except ValueError as error:
            raise ValueError(str(error) if str(self.manifest) in str(error) else f"{self.manifest}: {error}") from error

    def _limited(self, splits: Mapping[str, tuple[Clip, ...]]) -> dict[str, tuple[Clip, ...]]:
        for split, limit in self.limit.items():
            if split not in splits or limit < 1:
                raise ValueError(
                    f"{self.manifest}: limit {{{split}: {limit}}} is not possible; "
                    f"it takes numbers from 1 for the splits {_list(list(splits))}"
                )
        return {
            split: limit_clips(clips, self.limit[split], self.split_seed) if split in self.limit else clips
            for split, clips in splits.items()
        }

    def _place(self, clip: Clip) -> str:
        return clip.where.removeprefix(f"{self.manifest.name}, ")

    def _check_none(self, what: str, rows: Sequence[str]) -> None:
        if rows:
            raise ValueError(f"{self.manifest}: {what}: {first_five(rows)}")


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:30])
    return f"{shown} and {len(names) - 30} more" if len(names) > 30 else shown


def _windows_drive(clip: Clip) -> str:
    return " (a path of a Windows drive; make it relative to root)" if on_windows_drive(clip.video_id) else ""


def _suggestion(label: str, names: Sequence[str]) -> str:
    near = nearest(label, names)
    return "" if near is None else f" (did you mean {near!r}?)"
