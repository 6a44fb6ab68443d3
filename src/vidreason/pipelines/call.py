"""One call of ``vidreason pipeline``: parses and checks its options and opens the run that they describe."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from vidreason import exit_codes
from vidreason.config.options import CommandParser
from vidreason.config.vlm_shorthand import expand, is_shorthand
from vidreason.pipelines.commands import Commands, trainer_commands
from vidreason.pipelines.config_files import locate_config
from vidreason.pipelines.cross_fitting import cross_fitted
from vidreason.pipelines.runner import PipelineRun
from vidreason.pipelines.spec import PipelineSpec, read_pipeline
from vidreason.spelling import did_you_mean

_SETTING = re.compile(r"--(\w[\w.]*\+?)(?:=(.*))?", re.DOTALL)  # KEY+ appends to a list


@dataclass(frozen=True)
class PipelineCall:
    """The checked options of one call of ``vidreason pipeline``."""

    spec: PipelineSpec
    run_dir: Path
    use: dict[str, Path]
    until: str | None


def next_command(run_dir: Path) -> str:
    """Returns the command that uses a finished run."""
    return shlex.join(["vidreason", "classify", "new_clip.mp4", "--run", str(run_dir)])


def run_pipeline(argv: Sequence[str], commands: Commands | None = None) -> int:
    """Runs the pipeline that the options describe.

    Args:
        argv: Options of ``vidreason pipeline``.
        commands: The commands that stages run; by default those of this package, in this process.

    Returns:
        Exit status: 0 success, 2 wrong options or pipeline file, else that of the stage that stopped.
    """
    try:
        run = open_pipeline(argv, commands or trainer_commands())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.USAGE
    return run.run()


def open_pipeline(argv: Sequence[str], commands: Commands) -> PipelineRun:
    """Returns the pipeline that the options describe, with the state of its run folder.

    Raises:
        ValueError: If an option, stage or file does not exist, or the run folder belongs to another pipeline.
    """
    call = read_call(argv)
    again = shlex.join(["vidreason", "pipeline", *argv])
    return PipelineRun(call.spec, call.run_dir, commands, again, call.use, call.until)


def read_call(argv: Sequence[str]) -> PipelineCall:
    """Parses the options and reads the pipeline file with their overrides.

    Args:
        argv: Options of ``vidreason pipeline``.

    Raises:
        ValueError: If an option, stage or file does not exist; the message names it.
        SystemExit: For ``--help``, or if a required option is missing.
    """
    parser = CommandParser(
        prog="vidreason pipeline",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run stages in order; skip what is finished, resume what was interrupted.",
        epilog="Any setting can be overridden:\n"
        "  --STAGE.dotted.key VALUE     of one stage:   --grpo.trainer.max_steps 5\n"
        "  --SECTION.dotted.key VALUE   of every stage: --data.init_args.num_workers 2\n\n"
        "`vidreason pipeline` alone lists the shipped pipelines.",
    )
    parser.add_argument("--config", metavar="FILE", help="the pipeline: which stages in which order (required)")
    parser.add_argument("--run_dir", type=Path, metavar="DIR", help="where everything is written (required)")
    parser.add_argument("--data", metavar="FILE", help="data section for every stage (configs/data/...)")
    parser.add_argument(
        "--vlm",
        metavar="FILE|ID|FOLDER",
        help="model for every stage: a section (configs/vlm/...), a hub id such as Qwen/Qwen2.5-VL-3B-Instruct, or a "
        "model folder",
    )
    parser.add_argument(
        "--strategy",
        action="append",
        default=[],
        metavar="[STAGE=]NAME",
        help="how a stage, or every stage, trains: an overlay of configs/strategy (qlora, fsdp, ...) or a file",
    )
    parser.add_argument("--logger", metavar="NAME", help="where curves go: tensorboard (default), csv, wandb or mlflow")
    parser.add_argument("--seed", type=int, help="seed of every stage (default: the pipeline's, else 0)")
    parser.add_argument(
        "--use",
        action="append",
        default=[],
        metavar="STAGE=DIR",
        help="take a finished stage from another run (its run folder or stage folder) instead of running it",
    )
    parser.add_argument(
        "--folds",
        type=int,
        metavar="K",
        help="traces of train by K further policies, each trained without one fold of train and writing about it; 0 is "
        "off (default: the pipeline's, else 0)",
    )
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    options, rest = parser.parse_known_args(list(argv))
    overrides = _read_overrides(rest, vars(options))
    if options.config is None or options.run_dir is None:
        parser.error("--config and --run_dir are required")
    spec = read_pipeline(options.config).with_overrides(overrides)
    for section in ("data", "vlm"):
        if (name := getattr(options, section)) is not None:
            if section == "vlm" and is_shorthand(name):
                expand(name)  # raises now rather than in a stage
            else:
                locate_config(name, f"--{section}")
            spec = replace(spec, **{section: name})
    for item in options.strategy:
        stage, equals, name = item.rpartition("=")
        spec = spec.with_strategy(name, stage if equals else None)
    if options.logger is not None:
        spec = replace(spec, args={**spec.args, "logger": options.logger})
    if options.seed is not None:
        spec = replace(spec, seed=options.seed)
    if options.folds is not None:
        spec = replace(spec, folds=options.folds)
    spec = cross_fitted(spec)
    if options.until is not None:
        spec.stage(options.until)  # checks the name
    return PipelineCall(spec, options.run_dir, _read_use(options.use, spec), options.until)


def _read_use(items: Sequence[str], spec: PipelineSpec) -> dict[str, Path]:
    """Returns the folders of finished stages by name, from values of ``--use``."""
    use: dict[str, Path] = {}
    for item in items:
        stage, equals, folder = item.partition("=")
        if not equals:
            raise ValueError(f"--use {item}: must read STAGE=DIR")
        use[spec.stage(stage).name] = Path(folder)
    return use


def _read_overrides(arguments: Sequence[str], known: Iterable[str]) -> dict[str, object]:
    """Returns the settings ``--a.b value`` and ``--a.b=value``, with values parsed as YAML, by dotted key.

    Args:
        arguments: The words of the command line that are not options.
        known: Names of the options, for a hint at a misspelt one.
    """
    overrides: dict[str, object] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        match = _SETTING.fullmatch(word)
        if match is None or "." not in match[1]:
            hint = did_you_mean(word.partition("=")[0], [f"--{name}" for name in known])
            hint = hint or ": settings read --STAGE.dotted.key VALUE"
            raise ValueError(f"unknown option {word!r}{hint} (`vidreason pipeline --help`)")
        if match[2] is None and (not rest or rest[0].startswith("--")):
            raise ValueError(f"{word}: a value is missing")
        text = rest.pop(0) if match[2] is None else match[2]
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        # YAML also parses dates, for example; such values stay as they were typed
        overrides[match[1]] = value if isinstance(value, int | float | list | dict | None) else text
    if any(key.endswith("trainer.fast_dev_run") and value for key, value in overrides.items()):
        raise ValueError(
            "trainer.fast_dev_run writes nothing, but a stage needs what the one before has written: try each stage "
            "with `vidreason fit`, or make the pipeline short with --trainer.max_steps"
        )
    return overrides
