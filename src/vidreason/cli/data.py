"""``vidreason data check``: what a manifest holds, clip by clip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vidreason import exit_codes
from vidreason.cli.init import cores, positive
from vidreason.config.options import CommandParser
from vidreason.datamodules.sources.columns import ColumnNames
from vidreason.datamodules.sources.source import SourceOptions
from vidreason.spelling import did_you_mean

_ACTIONS = {"check": "decode every clip of a manifest and say what is wrong with it"}


def main(argv: Sequence[str]) -> int:
    """Runs one action on data.

    Args:
        argv: The action and its options.

    Returns:
        Exit status: 0, or 1 if a clip is rejected.

    Raises:
        ValueError: If the manifest or an option has a mistake.
        SystemExit: For ``--help`` or a wrong option.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: vidreason data ACTION [options]\n\nactions:")
        print("\n".join(f"  {name}  {what}" for name, what in _ACTIONS.items()))
        return exit_codes.OK
    if argv[0] not in _ACTIONS:
        raise ValueError(f"unknown action {argv[0]!r}{did_you_mean(argv[0], _ACTIONS) or ': check'}")
    given = _parser().parse_options(argv[1:])

    from vidreason.prepare.check import check_manifest, report_lines, write_report  # imports torch

    columns = ColumnNames(given.path_column, given.label_column, given.split_column, given.group_column)
    report = check_manifest(given.manifest, SourceOptions(columns, given.root), given.workers, given.timeout)
    if given.json is not None:
        write_report(report, given.json)
    print("\n".join(report_lines(report)))
    return exit_codes.ERROR if report.rejected else exit_codes.OK


def _parser() -> CommandParser:
    parser = CommandParser(prog="vidreason data check", description=_ACTIONS["check"].capitalize() + ".")
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="a table, chat records, or a folder of clips")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report into a file")
    for name in ("path", "label", "split", "group"):
        parser.add_argument(f"--{name}-column", metavar="NAME", help=f"the table's column of the {name}")
    parser.add_argument("--root", type=Path, metavar="DIR", help="what paths in the table are relative to")
    parser.add_argument(
        "--timeout", type=positive, default=30.0, metavar="S", help="seconds that reading a clip may take (default: 30)"
    )
    parser.add_argument(
        "--workers", type=int, default=cores(), metavar="N", help="clips read at the same time (default: the cores)"
    )
    return parser
