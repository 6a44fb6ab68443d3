"""The contents of a run folder: names of its files (each defined here only) and the state of a pipeline's stages.

A run folder belongs to one stage or to one pipeline, whose stages have their own folders below ``stages/``. This module
uses the standard library only, so that every part of the package can import it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

CONFIG_FILE = "config.yaml"
COMMAND_FILE = "command.txt"
SPLITS_FILE = "splits.csv"
"""Splits that the data module made."""
TASK_FILE = "task.yaml"
"""A copy of the task, so that the model can be used without the data set."""
TRACES_FILE = "traces.jsonl"
DESCRIPTIONS_FILE = "descriptions.jsonl"
"""Descriptions that a cold start wrote of clips without a trace that ends in the label."""
TEXT_QUALITY_FILE = "text_quality.json"
"""The verdict on texts that the base wrote."""
PREDICTIONS_FILE = "predictions.jsonl"
UNREADABLE_FILE = "unreadable.csv"
"""Clips that were left out because they could not be read."""
ADAPTER_FOLDER = "adapter"
WEIGHTS_FOLDER = "weights"
"""Replaces the adapter folder after full fine-tuning."""
FINISHED_FILE = "finished.json"
"""Written when a fit has finished; an interrupted fit has none."""
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
"""Artefact to its possible names in the folder of the stage that writes it."""

Status = Literal["running", "interrupted", "failed", "finished", "skipped"]
STATE_VERSION = 1


@dataclass
class StageRecord:
    """The record of one stage in ``state.json``."""

    status: Status
    folder: str
    """Relative to the run folder; for a stage taken from another run, the folder there."""
    inputs: dict[str, str]
    """Fingerprints of config, settings, data and upstream artefacts."""
    command: list[str] = field(default_factory=list)
    artefact_sha: str | None = None
    taken: bool = False
    """True if the stage finished in another run and was taken with ``--use``."""
    note: str = ""
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    """Times are summed over all attempts with the same inputs."""

    @property
    def done(self) -> bool:
        """True if the stage finished, or ended without an artefact as its ``on_unparsed: skip`` allows."""
        return self.status in ("finished", "skipped")

    @property
    def left_out(self) -> bool:
        """True if the stage was not run because its condition did not hold."""
        return self.status == "skipped" and not self.inputs


@dataclass
class RunState:
    """The state of a pipeline's run folder; ``vidreason.pipelines.state`` writes it."""

    pipeline: str
    train_clips: int | None = None
    stages: dict[str, StageRecord] = field(default_factory=dict)

    @classmethod
    def load(cls, run_dir: Path) -> RunState | None:
        """Reads ``state.json``; returns None if the folder has none.

        Raises:
            ValueError: If the file is damaged or has another version.
        """
        path = run_dir / STATE_FILE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.get("vidreason_state") != STATE_VERSION:
                raise ValueError(f"version {content.get('vidreason_state')!r}, expected {STATE_VERSION}")
            # keys that another release of the package has added are ignored
            known = {f.name for f in fields(StageRecord)}
            stages = {
                name: StageRecord(**{key: value for key, value in row.items() if key in known})
                for name, row in content["stages"].items()
            }
            return cls(content["pipeline"], content.get("train_clips"), stages)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); delete it to run every stage again") from error


def named_after(file: str, command: str) -> str:
    """Returns the name of a command's own file beside that of another command: ``config_test.yaml``."""
    path = Path(file)
    return f"{path.stem}_{command}{path.suffix}"


def artefact_path(folder: Path, artefact: Artefact) -> Path | None:
    """Returns the path of an artefact in the folder of a stage; None if it is missing or empty."""
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
        name: Stage of the pipeline; None selects its last finished test, else its last finished training.

    Raises:
        ValueError: If there is no such run or stage, or it has not finished; the message lists what exists.
    """
    if (run / STATE_FILE).is_file():
        folder = run / _stage_of(run, name)
        if name is None:
            _check_pipeline_finished(run)
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
    done = (FINISHED_FILE,) if not was_tested(folder) else (PREDICTIONS_FILE,)
    if not any((folder / file).is_file() for file in done) and not (run / STATE_FILE).is_file():
        raise ValueError(
            f"--run {run}: has not finished (no {done[0]}); its command, which goes on where it stopped, is in "
            f"{folder / COMMAND_FILE}"
        )
    return folder


def open_stages(run: Path) -> list[str]:
    """Returns the names of the stages of a pipeline that have not ended; none if ``run`` is that of a single stage."""
    state = RunState.load(run)
    if state is None:
        return []
    names = [*state.stages]
    if (run / PIPELINE_FILE).is_file():
        # Written by PipelineSpec.as_yaml; no YAML library here, where only the standard library is used.
        text = (run / PIPELINE_FILE).read_text(encoding="utf-8")
        names = re.findall(r"^- name: (\w+)$", text, flags=re.MULTILINE) or names
    return [name for name in names if name not in state.stages or not state.stages[name].done]


def _check_pipeline_finished(run: Path) -> None:
    """Checks that every stage of a pipeline has ended, so that the last one answers.

    Raises:
        ValueError: If one has not; the message names it and the stages that can be asked.
    """
    state = RunState.load(run)
    assert state is not None
    if open_ := open_stages(run):
        ready = [n for n, r in state.stages.items() if r.status == "finished" and r.command[:1] in (["test"], ["fit"])]
        raise ValueError(
            f"--run {run}: the pipeline has not finished ({', '.join(open_)}): give its command again"
            + (f", or ask a stage by name: --stage {' or '.join(ready)}" if ready else "")
        )


def _stage_of(run: Path, name: str | None) -> str:
    """Returns the folder of a pipeline's stage, relative to the run folder."""
    state = RunState.load(run)
    assert state is not None
    if name is not None and name not in state.stages:
        raise ValueError(f"--stage {name}: {run} has the stages {', '.join(state.stages)}")
    finished = {key: record for key, record in state.stages.items() if record.status == "finished"}
    if name is not None and name not in finished:
        raise ValueError(f"--stage {name}: is {state.stages[name].status}, not finished; run the pipeline again")
    # a stage that only generated traces has no weights of its own
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
    """Returns whether the folder belongs to a ``vidreason test``."""
    command = folder / COMMAND_FILE
    return command.is_file() and command.read_text(encoding="utf-8").startswith("vidreason test")
