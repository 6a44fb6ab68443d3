"""``vidreason export``: the model of a run as a folder for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vidreason import exit_codes
from vidreason.config.options import CommandParser
from vidreason.spelling import printable


def main(argv: Sequence[str]) -> int:
    """Exports the model of a finished run.

    Args:
        argv: Options of ``vidreason export``.

    Returns:
        Exit status 0.

    Raises:
        ValueError: If the run has not finished or cannot be exported, or the folder holds something else.
    """
    parser = CommandParser(
        prog="vidreason export",
        description="Write the model of a run as a folder that transformers, peft and vLLM load, with a model card.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of a pipeline or a stage")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--stage", metavar="NAME", help="stage of the pipeline (default: what it tested last)")
    parser.add_argument("--merge", action="store_true", help="whole models in full precision instead of adapters")
    parser.add_argument("--force", action="store_true", help="move another folder of that name to DIR.old")
    options = parser.parse_options(argv)

    # Importing this takes seconds: mistakes in the options are reported before.
    from vidreason.export.write import export_run

    made = export_run(options.run, options.stage, options.out, options.merge, options.force)
    print(
        printable(
            f"written: {made.folder}. Its log-probabilities differ from those of the run by at most "
            f"{made.difference:.1e} nats (clips of noise). README.md there says how to use it.\n"
            f"clips.json names {made.known_clips} clips of the data set by their content"
        )
        + (f"; {made.left_clips} others are not in it" if made.left_clips else "")
    )
    return exit_codes.OK
