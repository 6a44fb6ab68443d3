"""Does reasoning before deciding beat fine-tuning on the labels? Pipelines over seeds and numbers of labelled clips.

    python benchmarks/evidence.py [--seeds 5] [--labels 128,256] [--jobs 2] [--camera colour] [--json FILE] [--figure F]

Every seed has clips of its own: ``labels`` training clips, 64 of val, 128 of cal (for temperatures), 400 test clips at
L1 and 80 at each other level. Every fit and every test is a stage of a pipeline or of its evaluation: a second call
goes on where the first one stopped. ``--report`` only reads what has finished.

Differences between methods are paired: one number per seed on the same clips, and a Student-t interval over seeds
(``evaluation/intervals.py``). Beside each ECE is the mean ECE of a calibrated model with the same
confidences.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from evidence_report import FoundRun, draw, report
from figures import versions, write_json

from vidreason.demo.run import DATA
from vidreason.demo.side_by_side import Job, run_jobs
from vidreason.evaluation.plan import Mode
from vidreason.evaluation.run import EvaluateOptions, evaluate_run
from vidreason.pipelines.commands import trainer_commands
from vidreason.run_folder import RunState

METHODS: Mapping[str, tuple[Mode, ...]] = {
    "label_sft": ("likelihood",),
    "deepintuit": ("answer", "calibrated"),
    "rb_ft": ("likelihood",),
}
"""Pipelines, and the ways in which their stages decide."""
TRAINED = {"label_sft": "sft_label", "deepintuit": "calibration", "rb_ft": "sft_label"}
"""Last training stage of each pipeline. Its test follows in the evaluation, once and in every mode."""
LEVELS = (0, 1, 2, 3, 4)
DECIDING, OTHER = 400, 80
"""Test clips at L1, and at each other level."""
VAL, CAL = 64, 128
PACKAGES = ("vidreason", "torch", "lightning", "transformers")


@dataclass(frozen=True)
class Work:
    """One pipeline with one seed and one number of labelled clips."""

    method: str
    labels: int
    seed: int
    camera: str
    root: Path

    @property
    def name(self) -> str:
        """Its name in the output."""
        return f"{self.camera} {self.labels} labels seed {self.seed} {self.method}"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.world / self.method

    @property
    def world(self) -> Path:
        """The folder of all methods with the same clips."""
        return self.root / self.camera / f"labels{self.labels}" / f"seed{self.seed}"

    def options(self, levels: Sequence[int], deciding: int, other: int) -> tuple[str, ...]:
        """Returns the options of ``vidreason pipeline``."""
        data = {
            "data_dir": (self.world / "porch").as_posix(),
            "seed": self.seed,
            "camera": self.camera,
            "train_clips": self.labels,
            "val_clips": VAL,
            "cal_clips": CAL,
            "levels": list(levels),
            "test_clips": [deciding if level == 1 else other for level in levels],
        }
        config = f"configs/pipelines/{self.method}.yaml"
        options = ["--config", config, "--run_dir", self.folder.as_posix(), "--data", DATA, "--seed", str(self.seed)]
        options += ["--until", TRAINED[self.method]]
        for key, value in data.items():
            options += [f"--data.init_args.{key}", value if isinstance(value, str) else json.dumps(value)]
        return tuple(options)


def run_job(job: Job) -> int:
    """Runs a pipeline in a process of its own, then its evaluation; returns the exit status."""
    folder = job.options[job.options.index("--run_dir") + 1]
    evaluation = ["evaluate", "--run", folder, "--modes", *METHODS[Path(folder).name]]
    job.log.parent.mkdir(parents=True, exist_ok=True)
    for command in (["pipeline", *job.options], evaluation):
        with job.log.open("ab") as log:
            status = subprocess.run([sys.executable, "-m", "vidreason", *command], stdout=log, stderr=log).returncode
        if status != 0:
            print(f"{job.name}: {command[0]} ended with exit status {status}, see {job.log}", flush=True)
            return status
    print(f"{job.name}: finished", flush=True)
    return 0


def found_runs(works: Sequence[Work]) -> list[FoundRun]:
    """Returns the runs whose pipeline and evaluation have finished."""
    found = []
    for work in works:
        if (work.folder / "evaluation" / "evaluation.json").is_file():
            state = RunState.load(work.folder)
            assert state is not None, f"{work.folder} has an evaluation and no state"
            options = EvaluateOptions(None, METHODS[work.method], samples=4, probes=False)
            run = evaluate_run(work.folder, options, trainer_commands(), "benchmarks/evidence.py")
            seconds = sum(stage.wall_seconds or 0.0 for stage in state.stages.values())
            found.append(FoundRun(run, work.labels, work.world, seconds))
    return found


def main() -> int:
    """Runs what is missing and writes JSON and figure; returns the worst exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N - 1")
    parser.add_argument("--labels", type=_numbers, default=[128, 256], help="numbers of labelled clips, with commas")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--levels", type=_numbers, default=list(LEVELS))
    parser.add_argument("--clips", type=int, default=DECIDING, help="test clips at L1")
    parser.add_argument("--other_clips", type=int, default=OTHER, help="test clips at each other level")
    parser.add_argument("--camera", choices=("colour", "mono"), default="colour")
    parser.add_argument("--jobs", type=int, default=1, help="pipelines at a time, each in a process of one thread")
    parser.add_argument("--run_dir", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--report", action="store_true", help="run nothing, report what has finished")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--earlier", type=Path, nargs="+", default=[], help="JSON files of other runs to report as well"
    )
    parser.add_argument("--figure", type=Path, help="PNG of accuracy against labels and against level")
    options = parser.parse_args()
    works = [
        Work(method, labels, seed, options.camera, options.run_dir)
        for labels in options.labels
        for seed in range(options.seeds)
        for method in options.methods
    ]
    status = 0
    if not options.report:
        sizes = (options.levels, options.clips, options.other_clips)
        jobs = [Job(work.name, work.options(*sizes), work.folder / "log.txt") for work in works]
        status = max(run_jobs(jobs, options.jobs, run_job).values())
    found = found_runs(works)
    if not found and not options.earlier:
        print("no run has finished", file=sys.stderr)
        return status or 1
    content = {"date": date.today().isoformat(), "versions": versions(PACKAGES), "camera": options.camera}
    content |= {"command": " ".join(["benchmarks/evidence.py", *sys.argv[1:]])}
    content |= report(found, [json.loads(path.read_text(encoding="utf-8")) for path in options.earlier])
    labels = sorted({row["labels"] for row in content["rows"]})
    content |= {"labelled_clips": {"train": labels, "val": VAL, "cal": CAL}}
    write_json(options.json, content)
    if options.figure is not None:
        draw(content, options.figure)
    return status


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
