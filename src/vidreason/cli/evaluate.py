"""``vidreason evaluate``: which stage of a run brings what, with intervals and comparisons."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vidreason import exit_codes
from vidreason.config.options import CommandParser


def main(argv: Sequence[str]) -> int:
    """Evaluates finished runs; what an earlier call has decided is kept.

    Args:
        argv: Options of ``vidreason evaluate``.

    Returns:
        Exit status: 0, or that of the test stage that stopped.

    Raises:
        ValueError: If a run has not finished, or its test clips were used in training.
    """
    parser = CommandParser(
        prog="vidreason evaluate",
        description="Decide about the test clips with every stage of a run, and compare the stages.",
    )
    parser.add_argument(
        "--run",
        nargs="+",
        action="extend",
        required=True,
        type=Path,
        metavar="RUN",
        help="run folders; several seeds are averaged",
    )
    parser.add_argument("--splits", nargs="+", action="extend", metavar="SPLIT", help="default: every test split")
    parser.add_argument(
        "--modes",
        nargs="+",
        action="extend",
        metavar="MODE",
        help="likelihood, answer, vote, calibrated (default: all that apply)",
    )
    parser.add_argument("--samples", type=int, default=4, metavar="K", help="completions of a vote (default: 4)")
    parser.add_argument(
        "--probes", action="store_true", help="also without video, with shuffled frames, with another clip's traces"
    )
    parser.add_argument("--by_group", action="store_true", help="a row for each group of at least 5 clips, too")
    parser.add_argument("--against", metavar="METHOD", help="method to compare with (default: label SFT, or the base)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of all runs (each run has its own in any case)")
    options = parser.parse_options(argv)

    # Importing these takes seconds: mistakes in the options are reported before.
    from vidreason.evaluation.plan import EVALUATION_FOLDER, MODES
    from vidreason.evaluation.run import (
        EVALUATION_FILE,
        EvaluateOptions,
        EvaluationStoppedError,
        command_line,
        compare_methods,
        evaluate_run,
        rows_of_run,
        write_evaluation,
    )
    from vidreason.evaluation.table import render_evaluation
    from vidreason.evaluation.together import check_distinct, check_together
    from vidreason.pipelines.commands import trainer_commands
    from vidreason.spelling import did_you_mean, printable

    for mode in options.modes or ():
        if mode not in MODES:
            raise ValueError(f"--modes {mode}: one of {', '.join(MODES)}{did_you_mean(mode, MODES, '; ')}")
    if options.samples < 2:
        raise ValueError(f"--samples {options.samples}: a vote needs at least 2 completions")
    chosen = EvaluateOptions(
        splits=tuple(dict.fromkeys(options.splits)) if options.splits else None,
        modes=tuple(mode for mode in MODES if mode in (options.modes or MODES)),
        samples=options.samples,
        probes=options.probes,
    )
    check_distinct(options.run)
    again, commands, runs, rows = command_line("evaluate", argv), trainer_commands(), [], []
    try:
        for folder in options.run:
            run = evaluate_run(folder, chosen, commands, again)
            own = rows_of_run(run, options.by_group)
            write_evaluation(folder / EVALUATION_FOLDER / EVALUATION_FILE, own, compare_methods([run], None))
            runs.append(run)
            rows += own
    except EvaluationStoppedError as stop:
        return stop.status
    check_together(runs)
    comparisons = compare_methods(runs, options.against)
    print(printable(render_evaluation(rows, comparisons)))
    written = [folder / EVALUATION_FOLDER / EVALUATION_FILE for folder in options.run]
    if options.out is not None:
        write_evaluation(options.out, rows, comparisons)
        written.append(options.out)
    print("\nwritten: " + ", ".join(map(str, written)), file=sys.stderr)
    return exit_codes.OK
