"""``vidreason threshold``: the confidence below which the model of a run abstains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vidreason import exit_codes
from vidreason.config.options import CommandParser


def main(argv: Sequence[str]) -> int:
    """Fits a threshold on split ``cal`` and writes it beside the weights that answer.

    Args:
        argv: Options of ``vidreason threshold``.

    Returns:
        Exit status: 0, or that of the test stage that stopped.

    Raises:
        ValueError: If no threshold can be shown to keep the error; the message says how many clips would be needed.
    """
    parser = CommandParser(
        prog="vidreason threshold",
        description="Find a confidence above which decisions are wrong at most as often as you allow, from split cal.",
    )
    parser.add_argument("--run", required=True, type=Path, metavar="RUN", help="run folder of a pipeline or a stage")
    parser.add_argument("--stage", metavar="NAME", help="stage of the pipeline (default: what it tested last)")
    parser.add_argument("--error", type=float, default=0.10, metavar="E", help="largest error (default: 0.10)")
    options = parser.parse_options(argv)
    if not 0 < options.error < 1:
        raise ValueError(f"--error {options.error:g}: must be between 0 and 1, such as 0.10 for 10 %")

    # Importing these takes seconds: mistakes in the options are reported before.
    from vidreason.evaluation.run import EvaluationStoppedError, command_line, threshold_of_run
    from vidreason.pipelines.commands import trainer_commands

    try:
        again = command_line("threshold", argv)
        found = threshold_of_run(options.run, options.stage, options.error, trainer_commands(), again)
    except EvaluationStoppedError as stop:
        return stop.status
    print(
        f"confidence {found.confidence:.3f}: {found.coverage:.0%} of the clips of cal are accepted, {found.wrong} of "
        f"{found.accepted} wrongly, so that the error is below {found.bound:.1%} with 95 % certainty.\n"
        "classify and VideoClassifier abstain below it. It holds for clips like those of split cal, and for no others."
    )
    return exit_codes.OK
