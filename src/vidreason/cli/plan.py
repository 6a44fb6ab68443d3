"""``vidreason plan``: what a stage or pipeline will take, from the headers of clips and the model's configuration."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vidreason.config.options import CommandParser

_EPILOG = """further options are those of the command (--vlm, --data, --model.init_args...) or, with --pipeline,
those of `vidreason pipeline`:
  vidreason plan --config configs/grpo.yaml --vlm Qwen/Qwen2.5-VL-3B-Instruct --data my_task/data.yaml --memory 24GB
  vidreason plan --pipeline configs/pipelines/deepintuit.yaml --vlm FOLDER --data my_task/data.yaml --memory 80GB"""


def main(argv: Sequence[str]) -> int:
    """Prints the plan of a stage or pipeline.

    Args:
        argv: Options of ``vidreason plan``.

    Returns:
        Exit status 0.

    Raises:
        ValueError: If an option or file has a mistake, the model's configuration cannot be read, or a prompt does not
            fit into its context.
    """
    parser = CommandParser(
        prog="vidreason plan",
        description="Tokens, forward passes and memory of a stage or pipeline, without weights.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="a stage (configs/grpo.yaml), and its overlays"
    )
    parser.add_argument("--pipeline", metavar="FILE", help="a pipeline (configs/pipelines/deepintuit.yaml)")
    parser.add_argument(
        "--command",
        choices=("fit", "validate", "test", "predict"),
        default="fit",
        help="what is done with the stage of --config (default: fit)",
    )
    parser.add_argument("--memory", metavar="SIZE", help="memory of the device, such as 24GB: says what fits into it")
    parser.add_argument(
        "--device",
        choices=("gpu", "cpu"),
        default="gpu",
        help="where it will run: vlm.dtype auto is bfloat16 on a gpu, float32 on a cpu (default: gpu)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan to this file, too")
    options, rest = parser.parse_known_args(list(argv))
    if bool(options.config) == (options.pipeline is not None):
        parser.error("give --config or --pipeline, and not both")

    from vidreason.config.quiet import quietly
    from vidreason.plan import commands, report, stages

    memory = None if options.memory is None else report.memory_bytes(options.memory)
    planner = stages.StagePlanner(options.device == "gpu", memory)
    lines = commands.planned_commands(options.config, options.pipeline, options.command, rest)
    plans, model = [], ""
    for number, (name, line) in enumerate(lines.items(), 1):
        built = commands.build_planned(name, line)
        if not model:
            model = built.stage.vlm.path
            print(f"model: {model}; one process on a {options.device}; sizes in GB of 1e9 bytes", flush=True)
        with quietly():
            plans.append(planner.plan(built))
        print("\n" + report.stage_text(plans[-1], f"[{number}/{len(lines)}] {name}", memory), flush=True)
    if memory is not None:
        print(
            f"\nplanned with {stages.USABLE:.0%} of {memory / report.GB:.3g} GB; the rest is for context and fragments"
        )
    if options.json is not None:
        report.write_json(options.json, report.as_json(plans, model, memory, options.device))
    return 0
