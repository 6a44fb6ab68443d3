"""``vidreason init``: turns a folder or table of clips into the files that every command reads."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from vidreason.config.options import CommandParser
from vidreason.datamodules.sources.columns import ColumnNames
from vidreason.datamodules.sources.source import SourceOptions
from vidreason.prepare.task_folder import PrepareOptions, write_task_folder

_MOST_WORKERS = 8


def main(argv: Sequence[str]) -> int:
    """Reads a source, probes its clips and writes the files.

    Args:
        argv: Options of ``vidreason init``.

    Returns:
        Exit status 0.

    Raises:
        ValueError: If source or options have a mistake; the message names file, row or option and the remedy.
        SystemExit: For ``--help`` or a wrong option.
    """
    given = _parser().parse_options(argv)
    where = dict(_pair(text) for text in given.where)
    columns = ColumnNames(given.path_column, given.label_column, given.split_column, given.group_column)
    write_task_folder(
        PrepareOptions(
            source=given.source,
            out=given.out,
            reading=SourceOptions(columns, given.root, where),
            overwrite=given.force,
            new_splits=given.new_splits,
            seed=given.seed,
            timeout_s=given.timeout,
            workers=given.workers,
            vlm=given.vlm,
        )
    )
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="vidreason init",
        description="Look into every clip of a source and write manifest, task and data section for it into a folder.",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a folder with one folder of clips per class (train, val, test above or below them, or not at all), a "
        "table (.csv .tsv .txt .json .jsonl), or chat records with messages and videos (.json .jsonl)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files are written")
    parser.add_argument("--force", action="store_true", help="overwrite the files of an earlier call in DIR")
    for name, what in (
        ("path", "the clip's path"),
        ("label", "its class"),
        ("split", "train, val, cal, test"),
        ("group", "what must not be divided between splits: a person, a source video"),
    ):
        parser.add_argument(f"--{name}-column", metavar="NAME", help=f"the table's column with {what}")
    parser.add_argument("--root", type=Path, metavar="DIR", help="what paths in the table are relative to")
    parser.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=VALUE", help="only these rows of the table"
    )
    parser.add_argument(
        "--vlm",
        metavar="FILE|ID|FOLDER",
        help="the model that the frames are for, as `vidreason pipeline --vlm` takes it (default: the embedded base)",
    )
    parser.add_argument("--new-splits", action="store_true", help="make all splits, whatever the source says")
    parser.add_argument("--seed", type=int, default=0, help="of the splits that have to be made (default: 0)")
    parser.add_argument(
        "--timeout",
        type=positive,
        default=30.0,
        metavar="S",
        help="seconds that reading one clip may take (default: 30)",
    )
    parser.add_argument(
        "--workers", type=int, default=cores(), metavar="N", help="clips read at the same time (default: the cores)"
    )
    return parser


def _pair(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--where {text}: must read COLUMN=VALUE")
    return column, value


def positive(text: str) -> float:
    """Returns a positive number; for ``argparse``."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def cores() -> int:
    """Returns the number of clips to read at the same time: the cores of this process, at most eight."""
    # cpu_count() ignores CPU affinity, by which schedulers restrict jobs; macOS has no sched_getaffinity
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)
