"""Plans the evaluation of a finished run: which stages decide in which ways, as a pipeline of test stages.

The test stages run as ordinary commands in ``RUN/evaluation``, so that they resume, and run again when their inputs
have changed, like those of every pipeline.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from vidreason.config.finished_stage import FinishedStage, find_stage
from vidreason.datamodules.split_names import CALIBRATION_SPLIT
from vidreason.pipelines.spec import PipelineSpec
from vidreason.pipelines.stage import StageSpec
from vidreason.run_folder import (
    CONFIG_FILE,
    PIPELINE_FILE,
    STAGES_FOLDER,
    TRACES_FILE,
    RunState,
    StageRecord,
    was_tested,
)

Mode = Literal["likelihood", "answer", "vote", "calibrated"]
MODES: tuple[Mode, ...] = ("likelihood", "answer", "vote", "calibrated")
ZERO_SHOT = "zero_shot"
EVALUATION_FOLDER = "evaluation"
_MODEL = "model.init_args"
_PENALTIES = "penalties"
"""Argument of a linear probe, which is fitted when its test starts (``lightning_modules/probe.py``)."""
_PROBES = {"no video": "black", "frames shuffled": "shuffled"}
"""Name of a probe to the value of ``data.init_args.frames.probe``."""


@dataclass(frozen=True)
class Method:
    """One way in which one stage of a run decides."""

    name: str
    """For example ``grpo answer`` or ``calibration 4 traces``."""
    mode: Mode
    test: str
    """Name of the test stage whose predictions it reads."""
    samples: int
    """Completions or traces per clip; 0 without."""
    calibrator: str | None = None
    """Folder of the calibrator, whose temperature its predictions contain."""
    probe_of: str | None = None
    """Name of the method that a probe changes something for; its temperature applies."""


@dataclass(frozen=True)
class SwappedTraces:
    """A trace file to write in which every clip has the traces of another clip."""

    test: str
    """The test stage that writes the traces."""
    source: Path
    target: Path


@dataclass(frozen=True)
class EvaluationPlan:
    """The test stages of a run's evaluation, and the methods that are read from them."""

    spec: PipelineSpec
    methods: tuple[Method, ...]
    swaps: tuple[SwappedTraces, ...]


def plan_evaluation(
    run: Path, splits: Sequence[str], modes: Sequence[Mode], samples: int, probes: bool = False
) -> EvaluationPlan:
    """Plans the evaluation of a run.

    Every training stage decides by the likelihood of class names; a stage that reasons also by its answers; a
    calibrator by the mean over its traces, over all and over one of them. The untrained base is always there.

    Args:
        run: Run folder of a pipeline, or of a single ``vidreason fit`` or ``test``.
        splits: Splits to decide about; ``cal`` is for temperatures.
        modes: The modes to evaluate.
        samples: Completions per clip of a vote.
        probes: Whether every stage also decides without video, with shuffled frames and, if it reads traces, with
            those of another clip.

    Raises:
        ValueError: If the run has no finished stage with a model, or no stage has one of the modes.
    """
    name, seed, stages = finished_stages(run)
    plan = _Tests(run, splits, probes)
    for label, stage in [(ZERO_SHOT, _base(stages)), *_fitted_at_test(run), *stages]:
        init = _init_args(stage.folder)
        if "calibrator_path" in init:
            if "calibrated" in modes:
                reads = init.get("input") != "video"
                plan.add_calibrated(label, stage, int(init["traces"]["samples"]) if reads else 0)
            continue
        if _PENALTIES in init:
            if "likelihood" in modes:
                plan.add(label, "likelihood", stage, {}, probed=True)
            continue
        reasons = label != ZERO_SHOT and init.get("decide", {}).get("by") == "answer"
        if "likelihood" in modes:
            args = {f"{_MODEL}.decide.by": "likelihood"}
            plan.add(f"{label} likelihood", "likelihood", stage, args, probed=not reasons and label != ZERO_SHOT)
        if reasons and "answer" in modes:
            plan.add(f"{label} answer", "answer", stage, _answers(1, 0.0), 1, probed=True)
        if reasons and "vote" in modes:
            plan.add(f"{label} vote of {samples}", "vote", stage, _answers(samples, 1.0), samples)
    if not plan.methods:
        raise ValueError(f"--run {run}: none of its stages decides by {' or '.join(modes)}")
    spec = PipelineSpec(f"{name}_evaluation", f"evaluation of {name}", tuple(plan.tests), str(run), seed=seed)
    return EvaluationPlan(spec, tuple(plan.methods), tuple(plan.swaps))


def plan_cal(run: Path, name: str | None) -> tuple[EvaluationPlan, FinishedStage]:
    """Plans the decisions about split ``cal`` of the stage that answers, for a threshold.

    Args:
        run: The run folder.
        name: Stage of the pipeline; None takes the one that its last test tested.

    Raises:
        ValueError: If the stage decides by sampled answers, which have no probability.
    """
    stage = find_stage(run, name)
    init, plan = _init_args(stage.folder), _Tests(run, [CALIBRATION_SPLIT], probes=False)
    if "calibrator_path" in init:
        samples = int(init["traces"]["samples"])
        plan.add("cal", "calibrated", stage, {f"{_MODEL}.traces.samples": samples}, samples)
    elif init.get("decide", {}).get("by") == "answer":
        raise ValueError(
            f"{stage.folder}: decides by a sampled answer, which has no probability to put a threshold on; calibrate "
            "it first (configs/calibration.yaml), or name a stage that decides by likelihood with --stage"
        )
    else:
        plan.add("cal", "likelihood", stage, {})
    seed = finished_stages(run)[1]
    spec = PipelineSpec("threshold", "decisions about cal", tuple(plan.tests), str(run), seed=seed)
    return EvaluationPlan(spec, tuple(plan.methods), ()), stage


class _Tests:
    """Collects the test stages of an evaluation."""

    def __init__(self, run: Path, splits: Sequence[str], probes: bool) -> None:
        self.run, self.splits, self.probes = run, list(splits), probes
        self.tests: list[StageSpec] = []
        self.methods: list[Method] = []
        self.swaps: list[SwappedTraces] = []

    def add(
        self,
        label: str,
        mode: Mode,
        stage: FinishedStage,
        args: Mapping[str, object],
        samples: int = 0,
        probed: bool = False,
        probe_of: str | None = None,
    ) -> Path:
        """Adds a test stage and its method, with probes behind it if ``probed``; returns the folder of the stage."""
        test = re.sub(r"[^a-z0-9]+", "_", label)
        splits = self.splits if probe_of is None else [s for s in self.splits if s != CALIBRATION_SPLIT]
        settings = {**_weights(stage), **args, "data.init_args.test_splits": splits}
        self.tests.append(StageSpec(test, "test", str((stage.folder / CONFIG_FILE).resolve()), settings, {}))
        calibrator = stage.weights[-1] if mode == "calibrated" else None
        self.methods.append(Method(label, mode, test, samples, calibrator, probe_of))
        if probed and self.probes:
            for what, value in _PROBES.items():
                changed = {**args, "data.init_args.frames.probe": value}
                self.add(f"{label}, {what}", mode, stage, changed, samples, probe_of=label)
        return (self.run / EVALUATION_FOLDER / STAGES_FOLDER / f"{len(self.tests):02d}_{test}").resolve()

    def add_calibrated(self, label: str, stage: FinishedStage, samples: int) -> None:
        """Adds a calibrator over all of its traces, over one of them, and its probes, which reuse the traces.

        A calibrator that reads no traces, with 0 ``samples``, has the probes of the video alone.
        """
        if not samples:
            self.add(f"{label} without traces", "calibrated", stage, {}, probed=True)
            return
        number = f"{_MODEL}.traces.samples"
        whole = f"{label} {samples} trace{'s' * (samples > 1)}"
        folder = self.add(whole, "calibrated", stage, {number: samples}, samples)
        traces = {f"{_MODEL}.traces_file": str(folder / TRACES_FILE)}
        if samples > 1:
            self.add(f"{label} 1 trace", "calibrated", stage, {number: 1, **traces}, 1)
        if not self.probes:
            return
        for what, value in _PROBES.items():
            args = {number: samples, **traces, "data.init_args.frames.probe": value}
            self.add(f"{whole}, {what}", "calibrated", stage, args, samples, probe_of=whole)
        other = folder.parent.parent / f"{folder.name}_of_other_clips.jsonl"
        self.swaps.append(SwappedTraces(self.methods[-1].test, folder / TRACES_FILE, other))
        args = {number: samples, f"{_MODEL}.traces_file": str(other)}
        self.add(f"{whole}, another clip's traces", "calibrated", stage, args, samples, probe_of=whole)


def _answers(samples: int, temperature: float) -> dict[str, object]:
    return {
        f"{_MODEL}.decide.by": "answer",
        f"{_MODEL}.decide.samples": samples,
        f"{_MODEL}.decide.sampling.temperature": temperature,
    }


def _weights(stage: FinishedStage) -> dict[str, object]:
    """Returns the settings of the paths of a stage's weights, without the config."""
    pairs = zip(stage.options[2::2], stage.options[3::2], strict=True)
    return {key.removeprefix("--"): None if value == "null" else str(Path(value).resolve()) for key, value in pairs}


def _base(stages: Sequence[tuple[str, FinishedStage]]) -> FinishedStage:
    """Returns the untrained base, in the setting of the first stage that is not a calibrator."""
    for _, stage in stages:
        if "calibrator_path" not in _init_args(stage.folder):
            return FinishedStage(stage.folder, (*stage.options[:4], f"--{_MODEL}.adapter_path", "null"))
    raise ValueError(f"{stages[0][1].folder}: a calibrator alone cannot be evaluated; give the run of its pipeline")


def _init_args(folder: Path) -> dict[str, Any]:
    content = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return dict(content["model"].get("init_args") or {})


def finished_stages(run: Path) -> tuple[str, int, list[tuple[str, FinishedStage]]]:
    """Returns (name of the run, its seed, the finished stages that have a model, in order)."""
    state = RunState.load(run)
    if state is None:
        stage = find_stage(run)
        content = yaml.safe_load((stage.folder / CONFIG_FILE).read_text(encoding="utf-8"))
        seed = content.get("seed_everything")
        name = "test" if was_tested(stage.folder) else "fit"
        return run.resolve().name, int(seed or 0), [(name, stage)]

    def finished(command: str) -> list[str]:
        names = [name for name, record in state.stages.items() if _has_model(record, command)]
        return [name for name in names if not _trains_on_part(run / state.stages[name].folder)]

    names = finished("fit") or finished("test")
    if not names:
        raise ValueError(f"--run {run}: no training has finished; run its pipeline first")
    file = run / PIPELINE_FILE
    seed = yaml.safe_load(file.read_text(encoding="utf-8")).get("seed", 0) if file.is_file() else 0
    return state.pipeline, int(seed), [(name, find_stage(run, name)) for name in names]


def _fitted_at_test(run: Path) -> list[tuple[str, FinishedStage]]:
    """Returns the finished tests that fit their model themselves, and have no training before them."""
    state = RunState.load(run)
    names = [] if state is None else [name for name, record in state.stages.items() if _has_model(record, "test")]
    found = [(name, find_stage(run, name)) for name in names]
    return [(name, stage) for name, stage in found if _PENALTIES in _init_args(stage.folder)]


def _trains_on_part(folder: Path) -> bool:
    """Returns whether a stage left out a fold of train: its weights only write traces for cross-fitting."""
    content = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    init = (content.get("data") or {}).get("init_args") or {}
    return bool((init.get("fold") or {}).get("of"))


def _has_model(record: StageRecord, command: str) -> bool:
    return record.status == "finished" and record.command[:1] == [command]
