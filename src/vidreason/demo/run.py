"""The demo: renders the porch world to mp4 files, runs four shipped pipelines from the embedded base and compares them.

It adds only the settings below to the pipelines; every command that it prints can be run by hand.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vidreason import exit_codes
from vidreason.config.options import CommandParser
from vidreason.demo.report import write_report
from vidreason.demo.side_by_side import Job, Processes, RunJob, run_jobs
from vidreason.pipelines.call import next_command, open_pipeline
from vidreason.pipelines.commands import Commands
from vidreason.pipelines.spec import SECTIONS, read_pipeline

METHODS = ("zero_shot", "label_sft", "rb_ft", "deepintuit")
LONGEST_FIRST = METHODS[::-1]
"""The order in which methods begin, so that the last ones to end are short."""
LOG_FILE = "log.txt"
DATA = "configs/data/porch.yaml"
SHARED_STAGE = "generate"
"""Stage with the descriptions by the base: run by the first method that has it, and reused by the next."""

QUICK: Mapping[str, object] = {
    "data.init_args.levels": [0, 1],
    "data.init_args.train_clips": 24,
    "data.init_args.val_clips": 24,
    "data.init_args.cal_clips": 24,
    "data.init_args.test_clips": 24,
    "sft_rationale.trainer.max_epochs": 10,
    "sft_rationale.trainer.check_val_every_n_epoch": 10,
    "sft_cold_start.trainer.max_steps": 80,
    "sft_cold_start.trainer.val_check_interval": 80,
    "grpo.trainer.max_steps": 4,
    "grpo.trainer.val_check_interval": 4,
}
"""Settings of ``--quick``: the same stages on less data with fewer steps. Keys that begin with a section apply to every
stage, others to the stage of that name in each pipeline that has it."""

# Time and disk space, by --quick.
_ABOUT = {False: ("about 15 minutes on 2 cores", "about 150 MB"), True: ("about 6 minutes on 2 cores", "about 130 MB")}


def run_demo(argv: Sequence[str], commands: Commands, run: RunJob | None = None) -> int:
    """Runs the demo; stages that an earlier call finished are skipped.

    The method that writes the descriptions goes as far as these, and renders the clips; then all methods run side by
    side, each in a process of its own.

    Args:
        argv: Options of ``vidreason demo``.
        commands: The commands that stages run, for checks.
        run: Runs one pipeline; None runs it in a process of its own.

    Returns:
        Exit status: 0, or that of a pipeline that stopped.
    """
    options = _parser().parse_options(argv)
    if options.jobs < 1:
        raise ValueError(f"--jobs {options.jobs}: must be at least 1")
    started = time.monotonic()
    _introduce(options.run_dir, options.quick, options.jobs)
    again = shlex.join(["vidreason", "demo", *argv])
    settings = demo_settings(options.run_dir, options.seed, options.quick)
    lines = {name: pipeline_options(name, options.run_dir, options.seed, settings) for name in METHODS}
    print(f"\nchecking {len(METHODS)} pipelines ...", flush=True)
    try:
        # all pipelines are checked before the first one runs
        if not all(open_pipeline(line, commands).prepare() for line in lines.values()):
            return exit_codes.USAGE
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.USAGE
    except KeyboardInterrupt:
        print(f"interrupted; start again with\n  $ {again}", file=sys.stderr)
        return exit_codes.INTERRUPTED
    jobs = {name: Job(name, tuple(line), options.run_dir / name / LOG_FILE) for name, line in lines.items()}
    statuses = _run_all(jobs, options.jobs, run)
    for name, status in statuses.items():
        if status != 0:
            print(
                f"the demo stopped in {name} ({jobs[name].log}); finished stages are kept, go on with\n  $ {again}",
                file=sys.stderr,
            )
            return status
    print("\n=== comparison\n")
    print(write_report(options.run_dir, METHODS))
    minutes = (time.monotonic() - started) / 60
    print(f"\nthis call took {minutes:.1f} minutes; remove everything with: {_removal(options.run_dir)}")
    print(f"next: {next_command(options.run_dir / METHODS[-1])}")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="vidreason demo",
        description="Zero-shot, label SFT, RB-FT and DeepIntuit from one small base on a rendered world, compared.",
    )
    parser.add_argument("--run_dir", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    parser.add_argument("--seed", type=int, default=0, help="of the world, its clips and every stage")
    parser.add_argument("--quick", action="store_true", help="levels L0 and L1, a few clips: does everything work?")
    parser.add_argument(
        "--jobs", type=int, default=_free_jobs(), metavar="N", help="pipelines at a time (default: by cores)"
    )
    return parser


def _free_jobs() -> int:
    """Returns how many pipelines the cores of this process can run at a time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return max(1, min(len(METHODS), cores // int(threads) if threads.isdecimal() and int(threads) else 1))


def _run_all(jobs: Mapping[str, Job], at_once: int, run: RunJob | None) -> Mapping[str, int]:
    """Runs the shared stage, then all methods; returns exit statuses by method."""
    processes = Processes(lambda line: print(line, flush=True))
    one = run or processes
    maker = _maker()
    first = replace(jobs[maker], options=(*jobs[maker].options, "--until", SHARED_STAGE))
    with processes.passing_sigterm_on():
        print(f"\n=== the clips, and what the base says of them\n$ {_line(first)}", flush=True)
        statuses = run_jobs([first], 1, one)
        if any(statuses.values()):
            return statuses
        print(f"\n=== {len(jobs)} pipelines, {at_once} at a time; the output of each is in its {LOG_FILE}", flush=True)
        for job in jobs.values():
            print(f"$ {_line(job)}", flush=True)
        return run_jobs([jobs[name] for name in LONGEST_FIRST], at_once, one)


def _line(job: Job) -> str:
    return shlex.join(["vidreason", "pipeline", *job.options])


def _maker() -> str:
    """Returns the method that runs the shared stage."""
    return next(name for name in METHODS if SHARED_STAGE in _stages_of(name))


def demo_settings(run_dir: Path, seed: int, quick: bool) -> dict[str, object]:
    """Returns the settings that the demo adds to the shipped pipelines, by dotted key."""
    # All pipelines share one folder of clips: the first stage renders it, the others read it.
    shared = {"data.init_args.data_dir": (run_dir / "porch").as_posix(), "data.init_args.seed": seed}
    return {**shared, **(QUICK if quick else {})}


def pipeline_options(method: str, run_dir: Path, seed: int, settings: Mapping[str, object]) -> list[str]:
    """Returns the options of ``vidreason pipeline`` for one method.

    Args:
        method: Name of a shipped pipeline.
        run_dir: Folder of the demo.
        seed: Seed of every stage.
        settings: Dotted settings; those of stages that the pipeline lacks are left out.
    """
    stages = _stages_of(method)
    options = ["--config", _config_of(method), "--run_dir", (run_dir / method).as_posix()]
    options += ["--data", DATA, "--seed", str(seed)]
    for key, value in settings.items():
        if key.partition(".")[0] in (*SECTIONS, *stages):
            options += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    if SHARED_STAGE in stages and method != _maker():
        options += ["--use", f"{SHARED_STAGE}={(run_dir / _maker()).as_posix()}"]
    return options


def _config_of(method: str) -> str:
    return f"configs/pipelines/{method}.yaml"


def _stages_of(method: str) -> list[str]:
    return [stage.name for stage in read_pipeline(_config_of(method)).stages]


def _introduce(run_dir: Path, quick: bool, jobs: int) -> None:
    time_needed, space = _ABOUT[quick]
    print(
        "A small vision-language model has only learnt to describe what a doorbell camera sees. From a few labelled\n"
        f"clips it is taught to decide, in {len(METHODS)} ways: {', '.join(METHODS)}.\n"
        f"  writes   {run_dir}/  ({space}: clips, checkpoints, logs)\n"
        f"  takes    {time_needed}; stop it whenever you like, the same command goes on\n"
        f"  runs     {jobs} pipelines at a time (--jobs) with OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')}\n"
        f"  remove   {_removal(run_dir)}",
        flush=True,
    )


def _removal(run_dir: Path) -> str:
    return shlex.join(["rm", "-r", str(run_dir)])
