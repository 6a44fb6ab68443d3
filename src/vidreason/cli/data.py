"""``vidreason data``: checks what a manifest holds, clip by clip, and fills the cache of decoded frames."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from vidreason import exit_codes
from vidreason.cli.init import cores, positive
from vidreason.config.options import CommandParser
from vidreason.datamodules.sources.columns import ColumnNames
from vidreason.datamodules.sources.source import SourceOptions
from vidreason.spelling import did_you_mean

_ACTIONS = {
    "check": "decode every clip of a manifest and say what is wrong with it",
    "cache": "decode all clips of a fit into the folder of frames.cache",
}
_CACHE_EPILOG = """further options are those of `vidreason fit`, so that the same frames are taken:
  vidreason data cache --config configs/sft.yaml --data my_task/data.yaml --data.init_args.frames.cache FOLDER"""


def main(argv: Sequence[str]) -> int:
    """Runs one action on data.

    Args:
        argv: The action and its options.

    Returns:
        Exit status: 0, or 1 if ``check`` rejects a clip or ``cache`` cannot store one.

    Raises:
        ValueError: If the manifest, a config or an option has a mistake.
        SystemExit: For ``--help`` or a wrong option.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: vidreason data ACTION [options]\n\nactions:")
        print("\n".join(f"  {name}  {what}" for name, what in _ACTIONS.items()))
        return exit_codes.OK
    actions: dict[str, Callable[[Sequence[str]], int]] = {"check": _check, "cache": _cache}
    if argv[0] not in actions:
        raise ValueError(f"unknown action {argv[0]!r}{did_you_mean(argv[0], _ACTIONS) or ': ' + ', '.join(_ACTIONS)}")
    return actions[argv[0]](argv[1:])


def _check(argv: Sequence[str]) -> int:
    given = _check_parser().parse_options(argv)

    from vidreason.prepare.check import check_manifest, report_lines, write_report  # imports torch

    columns = ColumnNames(given.path_column, given.label_column, given.split_column, given.group_column)
    report = check_manifest(given.manifest, SourceOptions(columns, given.root), given.workers, given.timeout)
    if given.json is not None:
        write_report(report, given.json)
    print("\n".join(report_lines(report)))
    return exit_codes.ERROR if report.rejected else exit_codes.OK


def _cache(argv: Sequence[str]) -> int:
    parser = CommandParser(
        prog="vidreason data cache",
        description=_ACTIONS["cache"].capitalize() + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_CACHE_EPILOG,
    )
    parser.add_argument(
        "--config", action="append", required=True, metavar="FILE", help="a stage (configs/sft.yaml), and its overlays"
    )
    _add_workers(parser, "decoded")
    given, rest = parser.parse_known_args(list(argv))

    from vidreason.plan.commands import build_planned, planned_commands  # imports torch
    from vidreason.prepare.caching import fill_cache

    ((name, line),) = planned_commands(given.config, None, "fit", rest).items()
    report = fill_cache(build_planned(name, line).data, given.workers)
    print("\n".join(report.lines()))
    return exit_codes.ERROR if report.stopped else exit_codes.OK


def _check_parser() -> CommandParser:
    parser = CommandParser(prog="vidreason data check", description=_ACTIONS["check"].capitalize() + ".")
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="a table, chat records, or a folder of clips")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report into a file")
    for name in ("path", "label", "split", "group"):
        parser.add_argument(f"--{name}-column", metavar="NAME", help=f"the table's column of the {name}")
    parser.add_argument("--root", type=Path, metavar="DIR", help="what paths in the table are relative to")
    parser.add_argument(
        "--timeout", type=positive, default=30.0, metavar="S", help="seconds that reading a clip may take (default: 30)"
    )
    _add_workers(parser, "read")
    return parser


def _add_workers(parser: CommandParser, done: str) -> None:
    parser.add_argument(
        "--workers", type=int, default=cores(), metavar="N", help=f"clips {done} at the same time (default: the cores)"
    )
