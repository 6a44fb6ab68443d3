"""Reads what a report shows of an evaluated run: scores, decisions, thresholds, the task and the stages."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from vidreason.config.finished_stage import find_stage, threshold_folder
from vidreason.datamodules.task import Task
from vidreason.evaluation.plan import EVALUATION_FOLDER, MODES, Method, finished_stages, plan_evaluation
from vidreason.evaluation.rows import Evaluated, EvaluationRow
from vidreason.evaluation.run import EVALUATION_FILE, EvaluatedRun
from vidreason.evaluation.together import check_together
from vidreason.lightning_modules.decisions.threshold import Threshold
from vidreason.lightning_modules.vlms.loading.weight_folders import INFO_FILE
from vidreason.report.rows import read_evaluation
from vidreason.run_folder import (
    COMMAND_FILE,
    CONFIG_FILE,
    PIPELINE_FILE,
    SUMMARY_FILE,
    RunState,
    StageRecord,
    artefact_path,
    open_stages,
    was_tested,
)


@dataclass(frozen=True)
class ReportStage:
    """One stage of a run."""

    name: str
    folder: Path
    command: str
    """The command line that ran it; empty if it is not known."""
    record: StageRecord | None
    """None for the run of a single stage."""
    info: dict[str, object]
    """The entries of ``vidreason.json`` beside its weights; empty without weights."""


@dataclass(frozen=True)
class ReportRun:
    """One evaluated run."""

    folder: Path
    rows: tuple[EvaluationRow, ...]
    evaluated: EvaluatedRun
    """The methods whose decisions are there."""
    stages: tuple[ReportStage, ...]
    answers_with: str
    """Name of the stage whose weights the run answers with (``vidreason classify``); empty if it is none of its own."""
    thresholds: dict[str, Threshold]
    """By name of the method that a threshold belongs to."""
    task: Task
    train_clips: int | None
    notes: tuple[str, ...]
    """Remarks on the result in the run's own ``summary.json``, and what has not finished."""

    @property
    def name(self) -> str:
        """Name of the pipeline, with the seed."""
        return f"{self.evaluated.pipeline}, seed {self.evaluated.seed}"

    def methods(self, probes: bool = False) -> list[Evaluated]:
        """Returns the methods without the probes, or the probes alone."""
        return [one for one in self.evaluated.methods if (one.method.probe_of is not None) == probes]


def read_runs(folders: Sequence[Path]) -> list[ReportRun]:
    """Reads evaluated runs.

    Raises:
        ValueError: If a run was not evaluated, or the runs do not belong together (``check_together``).
    """
    runs = [read_run(folder) for folder in folders]
    check_together([run.evaluated for run in runs])
    return runs


def read_run(folder: Path) -> ReportRun:
    """Reads one evaluated run.

    Raises:
        ValueError: If there is no such run, or it was not evaluated; the message has the command.
    """
    try:
        # what has finished can be evaluated, and shown
        stage = finished_stages(folder)[2][-1][1] if open_stages(folder) else find_stage(folder)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("--run ")) from error
    path = folder / EVALUATION_FOLDER / EVALUATION_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: has not been evaluated; run: vidreason evaluate --run {folder} --probes")
    file, state = read_evaluation(path), RunState.load(folder)
    first = file.rows[0]
    methods = _methods(folder, file.rows)
    decided = _decided(folder, methods, file.label_names)
    stages, answering = _stages(folder, state), threshold_folder(stage).resolve()
    return ReportRun(
        folder=folder,
        rows=file.rows,
        evaluated=EvaluatedRun(folder, first.who.pipeline, first.who.seed, tuple(decided), file.label_names),
        stages=tuple(stages),
        answers_with=next((one.name for one in stages if one.folder.resolve() == answering), ""),
        thresholds=_thresholds(folder, methods, state),
        task=Task.from_yaml(stage.task_file),
        train_clips=state.train_clips if state else None,
        notes=_notes(folder),
    )


def _notes(folder: Path) -> tuple[str, ...]:
    """Returns the remarks of the run's summary, and which trainings the run still lacks."""
    summary, pipeline = folder / SUMMARY_FILE, folder / PIPELINE_FILE
    rows = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else []
    found = [part for row in rows for part in row.get("note", "").split("; ") if part]
    stages = yaml.safe_load(pipeline.read_text(encoding="utf-8"))["stages"] if pipeline.is_file() else []
    # a stage with a condition may never have to run
    trainings = [stage["name"] for stage in stages if stage.get("command") == "fit" and "when" not in stage]
    if missing := [name for name in open_stages(folder) if name in trainings]:
        found.append(f"training has not finished ({', '.join(missing)}), and what had finished was evaluated")
    return tuple(dict.fromkeys(found))


def _methods(folder: Path, rows: Sequence[EvaluationRow]) -> list[Method]:
    """Returns the methods of the rows, in their order; baselines that are no stage of the run have none."""
    names = dict.fromkeys(row.who.method for row in rows)
    votes = [match for name in names if (match := re.search(r" vote of (\d+)$", name))]
    samples = int(votes[0][1]) if votes else 2
    known = {method.name: method for method in plan_evaluation(folder, [], MODES, samples, probes=True).methods}
    return [known[name] for name in names if name in known]


def _decided(folder: Path, methods: Sequence[Method], label_names: Sequence[str]) -> list[Evaluated]:
    """Returns the decisions of the methods whose predictions are there; a method stands before its probes."""
    state = RunState.load(folder / EVALUATION_FOLDER)
    found: dict[str, Evaluated] = {}
    for method in methods:
        record = state.stages.get(method.test) if state else None
        path = artefact_path(folder / EVALUATION_FOLDER / record.folder, "predictions") if record else None
        if path is not None:
            own = found.get(method.probe_of or "")
            found[method.name] = Evaluated.read(method, path, label_names, None, own.temperature if own else None)
    return list(found.values())


def _stages(folder: Path, state: RunState | None) -> list[ReportStage]:
    places = (
        {"stage": (folder, None)}
        if state is None
        else {name: (folder / record.folder, record) for name, record in state.stages.items()}
    )
    found = []
    for name, (place, record) in places.items():
        command, weights = place / COMMAND_FILE, artefact_path(place, "adapter")
        info = weights / INFO_FILE if weights else None
        found.append(
            ReportStage(
                name,
                place,
                command.read_text(encoding="utf-8").strip() if command.is_file() else "",
                record,
                json.loads(info.read_text(encoding="utf-8")) if info and info.is_file() else {},
            )
        )
    return found


def _thresholds(folder: Path, methods: Sequence[Method], state: RunState | None) -> dict[str, Threshold]:
    """Returns the thresholds of a run's stages by the method that decides like the stage itself."""
    names = [None] if state is None else [n for n, r in state.stages.items() if r.command[:1] == ["fit"] and r.done]
    found = {}
    for name in names:
        stage = find_stage(folder, name)
        threshold = Threshold.load(threshold_folder(stage))
        if threshold is None:
            continue
        label = name or ("test" if was_tested(stage.folder) else "fit")  # as plan_evaluation names a single stage
        for method in methods:
            own = method.name.startswith(f"{label} ")
            decides = method.mode in ("likelihood", "calibrated") and method.samples == threshold.samples
            if own and decides and method.probe_of is None:
                found[method.name] = threshold
    return found


def model_name(stage: ReportStage) -> str:
    """Returns the name of the model of a stage from its configuration; empty if it has none."""
    file = stage.folder / CONFIG_FILE
    vlm = yaml.safe_load(file.read_text(encoding="utf-8")).get("vlm") if file.is_file() else None
    return str(vlm["init_args"]["path"]) if vlm else ""
