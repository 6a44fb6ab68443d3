"""``vidreason report``: evaluated runs as one HTML file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vidreason import exit_codes
from vidreason.config.options import CommandParser


def main(argv: Sequence[str]) -> int:
    """Writes the report of evaluated runs.

    Args:
        argv: Options of ``vidreason report``.

    Returns:
        Exit status 0.

    Raises:
        ValueError: If a run was not evaluated, or the runs do not belong together.
    """
    parser = CommandParser(
        prog="vidreason report",
        description="Write evaluated runs as one HTML file, to look at in any browser and to hand on.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders that were evaluated")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    options = parser.parse_options(argv)
    if options.out.is_dir():
        raise ValueError(f"--out {options.out}: is a folder; name a file in it, such as {options.out / 'report.html'}")

    # Importing these takes seconds: mistakes in the options are reported before.
    from vidreason.report.build import gather, write_report

    write_report(gather(options.runs), options.out)
    print(f"written: {options.out} ({options.out.stat().st_size / 1e6:.1f} MB)", file=sys.stderr)
    return exit_codes.OK
