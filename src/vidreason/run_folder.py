"""What a run folder holds: the names of its files, each written here only, and the state of a pipeline's stages.

A run folder belongs to one stage or to one pipeline, whose stages have folders of their own below ``stages/``. This
module needs the standard library only, so that every part of the package can import it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

CONFIG_FILE = "config.yaml"
COMMAND_FILE = "command.txt"
TASK_FILE = "task.yaml"
"""A copy of the task, so that the model can be asked where the data set is not"""
TRACES_FILE = "traces.jsonl"
PREDICTIONS_FILE = "predictions.jsonl"
UNREADABLE_FILE = "unreadable.csv"
"""Clips that were left out because they could not be read"""
ADAPTER_FOLDER = "adapter"
WEIGHTS_FOLDER = "weights"
"""In place of the adapter's folder after full fine-tuning"""
CHECKPOINTS_FOLDER = "checkpoints"
LAST_CHECKPOINT = "last.ckpt"
TENSORBOARD_FOLDER = "tb"

STAGES_FOLDER = "stages"
STATE_FILE = "state.json"
PIPELINE_FILE = "pipeline.yaml"
SUMMARY_FILE = "summary.json"
SUMMARY_TABLE = "summary.txt"

Artefact = Literal["adapter", "traces", "predictions"]
ARTEFACT_FILES: Mapping[str, tuple[str, ...]] = {
    "adapter": (ADAPTER_FOLDER, WEIGHTS_FOLDER),
    "traces": (TRACES_FILE,),
    "predictions": (PREDICTIONS_FILE,),
}
"""What a stage hands to later ones, and where it may lie in the stage's folder"""

Status = Literal["running", "interrupted", "failed", "finished", "skipped"]
STATE_VERSION = 1


@dataclass
class StageRecord:
    """What is known of one stage of a run."""

    status: Status
    folder: str
    """Relative to the run folder; a stage taken from another run has that run's folder"""
    inputs: dict[str, str]
    """Fingerprints of config, settings, data and upstream artefacts"""
    command: list[str] = field(default_factory=list)
    artefact_sha: str | None = None
    taken: bool = False
    """True: finished in another run and taken with ``--use``"""
    note: str = ""
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    """Times add up over every attempt on the same inputs"""

    @property
    def done(self) -> bool:
        """Nothing is left to do: finished, or ended without an artefact as the pipeline allows."""
        return self.status in ("finished", "skipped")


@dataclass
class RunState:
    """The state of a pipeline's run folder; ``vidreason.pipelines.state`` writes it."""

    pipeline: str
    train_clips: int | None = None
    stages: dict[str, StageRecord] = field(default_factory=dict)

    @classmethod
    def load(cls, run_dir: Path) -> RunState | None:
        """Reads ``state.json``; returns None where the folder has none.

        Raises:
            ValueError: The file is damaged or of another version.
        """
        path = run_dir / STATE_FILE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.get("vidreason_state") != STATE_VERSION:
                raise ValueError(f"version {content.get('vidreason_state')!r}, expected {STATE_VERSION}")
            known = {f.name for f in fields(StageRecord)}
            stages = {
                name: StageRecord(**{key: value for key, value in row.items() if key in known})
                for name, row in content["stages"].items()
            }
            return cls(content["pipeline"], content.get("train_clips"), stages)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); delete it to run every stage again") from error


def artefact_path(folder: Path, artefact: Artefact) -> Path | None:
    """Returns where a stage's folder holds an artefact; None where it does not (an empty one counts as missing)."""
    for name in ARTEFACT_FILES[artefact]:
        path = folder / name
        if path.is_dir() and any(path.iterdir()):
            return path
        if path.is_file() and path.stat().st_size > 0:
            return path
    return None


def find_stage_folder(run: Path, name: str | None = None) -> Path:
    """Finds the folder of a finished stage.

    Args:
        run: Run folder of a pipeline, or of a single ``vidreason fit`` or ``test``.
        name: Stage of the pipeline; None takes its last finished test, else its last finished training.

    Raises:
        ValueError: There is no such run or stage, or it has not finished; the message says what there is.
    """
    if (run / STATE_FILE).is_file():
        folder = run / _stage_of(run, name)
    elif (run / CONFIG_FILE).is_file():
        if name is not None:
            raise ValueError(f"--stage {name}: {run} is the folder of a single stage, leave --stage out")
        folder = run
    else:
        inside = sorted(path.parent.name for path in run.glob(f"*/{STATE_FILE}"))
        hint = f"; it holds the runs {', '.join(inside)}, choose one" if inside else ""
        raise ValueError(f"--run {run}: no finished run there ({STATE_FILE} or {CONFIG_FILE}){hint}")
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder}: has no {CONFIG_FILE}, so the stage never started")
    return folder


def _stage_of(run: Path, name: str | None) -> str:
    state = RunState.load(run)
    assert state is not None
    if name is not None and name not in state.stages:
        raise ValueError(f"--stage {name}: {run} has the stages {', '.join(state.stages)}")
    finished = {key: record for key, record in state.stages.items() if record.status == "finished"}
    if name is not None and name not in finished:
        raise ValueError(f"--stage {name}: is {state.stages[name].status}, not finished; run the pipeline again")
    askable = [key for key, record in finished.items() if record.command[:1] in (["test"], ["fit"])]
    if name is not None:
        if name not in askable:
            raise ValueError(f"--stage {name}: trains no model; there are {', '.join(askable)}")
        return finished[name].folder
    tests = [key for key in askable if finished[key].command[0] == "test"]
    if not askable:
        raise ValueError(f"--run {run}: no stage has finished; run the pipeline again")
    return finished[(tests or askable)[-1]].folder


def was_tested(folder: Path) -> bool:
    """Whether the stage of a folder is a ``vidreason test``."""
    command = folder / COMMAND_FILE
    return command.is_file() and command.read_text(encoding="utf-8").startswith("vidreason test")
