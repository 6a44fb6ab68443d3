"""Finds in a run folder the model to ask: which stage, its config, its weights and its task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from vidreason.pipelines.state import STATE_FILE, RunState, artefact_path

CONFIG_FILE = "config.yaml"
TASK_FILE = "task.yaml"
_STAGES = "stages"
_WEIGHT_KEYS = ("adapter_path", "calibrator_path")


@dataclass(frozen=True)
class FinishedStage:
    """A stage whose model can be asked."""

    folder: Path
    options: tuple[str, ...]
    """Of ``vidreason test``: the stage's own config, with paths as they are now"""

    @property
    def task_file(self) -> Path:
        """Copy of the task that the stage ran on."""
        return self.folder / TASK_FILE


def find_stage(run: Path, name: str | None = None) -> FinishedStage:
    """Finds the stage to ask.

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
    config_file = folder / CONFIG_FILE
    if not config_file.is_file():
        raise ValueError(f"{folder}: has no {CONFIG_FILE}, so the stage never started")
    model = yaml.safe_load(config_file.read_text(encoding="utf-8"))["model"]["init_args"]
    given = {key: model.get(key) for key in _WEIGHT_KEYS}
    weights = given if _was_tested(folder) else _own_weights(folder, "calibrator_path" in model)
    options = ["--config", str(config_file)]
    for key in _WEIGHT_KEYS:
        if key in model:
            path = weights.get(key)
            options += [f"--model.init_args.{key}", "null" if path is None else _present(path, run)]
    return FinishedStage(folder, tuple(options))


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


def _was_tested(folder: Path) -> bool:
    command = folder / "command.txt"
    return command.is_file() and command.read_text(encoding="utf-8").startswith("vidreason test")


def _own_weights(folder: Path, calibrates: bool) -> dict[str, str | None]:
    """What a training stage wrote, as the options that load it."""
    path = artefact_path(folder, "adapter")
    if path is None:
        raise ValueError(f"{folder}: holds neither adapter/ nor weights/, so the training has not finished")
    return {"adapter_path": None, "calibrator_path": str(path)} if calibrates else {"adapter_path": str(path)}


def _present(path: str, run: Path) -> str:
    """The path within ``run`` where it has been moved or is called from elsewhere; otherwise the path itself."""
    parts = Path(path).parts
    if _STAGES in parts:
        moved = run.joinpath(*parts[len(parts) - 1 - parts[::-1].index(_STAGES) :])
        if moved.exists():
            return str(moved)
    return path
