"""Evaluates finished runs: decides with every method, scores the decisions and compares the methods."""

from __future__ import annotations

import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from vidreason.config.finished_stage import threshold_folder
from vidreason.config.quiet import quietly
from vidreason.datamodules.atomic_files import write_text
from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.split_names import CALIBRATION_SPLIT
from vidreason.datamodules.traces import TraceStore
from vidreason.datamodules.types import Clip
from vidreason.evaluation.decisions import Decisions
from vidreason.evaluation.intervals import Difference, compare
from vidreason.evaluation.leaks import check_unseen
from vidreason.evaluation.plan import (
    EVALUATION_FOLDER,
    EvaluationPlan,
    Method,
    Mode,
    SwappedTraces,
    finished_stages,
    plan_cal,
    plan_evaluation,
)
from vidreason.evaluation.rows import Evaluated, EvaluationRow, rows_of
from vidreason.evaluation.threshold import fit_threshold
from vidreason.lightning_modules.decisions.threshold import Threshold
from vidreason.lightning_modules.vlms.loading.weight_folders import adapter_sha
from vidreason.pipelines.commands import Commands
from vidreason.pipelines.runner import PipelineRun
from vidreason.run_folder import CONFIG_FILE, artefact_path, open_stages

EVALUATION_FILE = "evaluation.json"
THRESHOLD_FOLDER = "threshold"
MAJORITY = "majority"
LABEL_SFT = ("label_sft: sft_label likelihood", "baselines: sft_label likelihood")
"""Label SFT by the pipelines that are about it; ``deepintuit`` has a stage of that name that replaces its others."""


class EvaluationStoppedError(Exception):
    """A test stage of an evaluation ended with an exit status other than 0."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of an evaluation."""

    splits: tuple[str, ...] | None
    """None is every test split."""
    modes: tuple[Mode, ...]
    samples: int
    """Completions per clip of a vote."""
    probes: bool
    """True if stages also decide without video, with shuffled frames and with another clip's traces."""


@dataclass(frozen=True)
class EvaluatedRun:
    """A run with the decisions of its methods."""

    folder: Path
    pipeline: str
    seed: int
    methods: tuple[Evaluated, ...]
    label_names: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """The difference between two methods on one split."""

    first: str
    second: str
    split: str
    difference: Difference


def evaluate_run(run: Path, options: EvaluateOptions, commands: Commands, again: str) -> EvaluatedRun:
    """Decides about the test clips of a run with each of its methods; what an earlier call finished is kept.

    Args:
        run: The run folder.
        options: What to evaluate.
        commands: The commands that test stages run.
        again: The command line of this call, for messages.

    Raises:
        ValueError: If no training of the run has finished, or its test clips were used in training.
        EvaluationStoppedError: If a test stage was interrupted or failed.
    """
    if open_ := open_stages(run):
        print(f"--run {run}: {', '.join(open_)} not finished: what has finished is evaluated")
    data = _data_of(run)
    tested = options.splits or data.test_split_names
    check_unseen(run, data, tested)
    splits = [*([CALIBRATION_SPLIT] if data.clips(CALIBRATION_SPLIT) else []), *tested]
    plan = plan_evaluation(run, splits, options.modes, options.samples, options.probes)
    folder = run / EVALUATION_FOLDER
    for swap in plan.swaps:
        _finish(PipelineRun(plan.spec, folder, commands, again, until=swap.test))
        write_swapped(swap, [data.clips(split) for split in tested])
    pipeline = PipelineRun(plan.spec, folder, commands, again)
    _finish(pipeline)
    found = _read(run, plan, pipeline, data.label_names)
    return replace(found, methods=(majority(data, found.methods[0]), *found.methods))


def majority(data: VideoDataModule, other: Evaluated) -> Evaluated:
    """Returns the baseline that always answers the largest class of train, with the shares of train as probabilities.

    Args:
        data: The data module.
        other: A method that decided about the same clips.
    """
    counts = Counter(clip.label for clip in data.clips("train"))
    shares = np.array([counts[name] + 1.0 for name in data.label_names])  # no class is impossible
    shares /= shares.sum()
    decisions = {}
    for split, own in other.decisions.items():
        pred = np.full(len(own), int(shares.argmax()))
        probs = np.tile(shares, (len(own), 1))
        decisions[split] = replace(own, pred=pred, probs=probs, confidence=probs.max(1), tokens=0.0)
    return Evaluated.of(Method(MAJORITY, "likelihood", "", 0), decisions)


def write_swapped(swap: SwappedTraces, splits: Sequence[Sequence[Clip]]) -> None:
    """Writes a trace file in which every clip has the traces of the next clip of another label.

    Args:
        swap: The files.
        splits: The clips of each split; a clip of a split with a single label gets its own traces.
    """
    store = TraceStore.open(swap.source)
    traces, records = store.by_video(kept_only=False), []
    for clips in splits:
        for place, clip in enumerate(clips):
            following = (*clips[place + 1 :], *clips[:place])
            other = next((c for c in following if c.label != clip.label and c.video_id in traces), clip)
            records += [replace(record, video_id=clip.video_id) for record in traces.get(other.video_id, ())]
    swap.target.unlink(missing_ok=True)
    TraceStore.create(swap.target, store.header).append(records)


def _finish(pipeline: PipelineRun) -> None:
    status = pipeline.run(summarise=False)
    if status != 0:
        raise EvaluationStoppedError(status)


def threshold_of_run(run: Path, name: str | None, error: float, commands: Commands, again: str) -> Threshold:
    """Fits a threshold for the stage of a run that answers, and writes it beside the weights of that stage.

    Args:
        run: The run folder.
        name: Stage of the pipeline; None takes the one that its last test tested.
        error: Largest share of wrong decisions among accepted ones.
        commands: The commands that the test stage runs.
        again: The command line of this call, for messages.

    Raises:
        ValueError: If the run has no split ``cal``, or no threshold can be shown to keep the error.
        EvaluationStoppedError: If the test stage was interrupted or failed.
    """
    data = _data_of(run)
    if not data.clips(CALIBRATION_SPLIT):
        raise ValueError(f"--run {run}: its data have no split cal, and a threshold from other clips would not hold")
    plan, stage = plan_cal(run, name)
    pipeline = PipelineRun(plan.spec, run / THRESHOLD_FOLDER, commands, again)
    _finish(pipeline)
    path = artefact_path(run / THRESHOLD_FOLDER / pipeline.state.stages["cal"].folder, "predictions")
    assert path is not None, "a finished test stage has its predictions"
    decided = Evaluated.read(plan.methods[0], path, data.label_names, None).decisions[CALIBRATION_SPLIT]
    sha = adapter_sha(stage.weights[-1]) if stage.weights else ""
    found = fit_threshold(decided, error, sha, plan.methods[0].samples, plan.spec.seed)
    found.save(threshold_folder(stage))
    return found


def rows_of_run(found: EvaluatedRun, by_group: bool) -> list[EvaluationRow]:
    """Returns the rows of all methods of a run."""
    return [row for one in found.methods for row in rows_of(one, found.folder, found.pipeline, found.seed, by_group)]


def compare_methods(runs: Sequence[EvaluatedRun], against: str | None) -> list[Comparison]:
    """Compares every method with one of them, and every probe with its method, on every split over the seeds.

    Args:
        runs: Evaluated runs; those of one pipeline with different seeds count as repetitions.
        against: ``pipeline: method``, or a method that only one pipeline has; None takes label SFT if there is one
            and another pipeline to compare it with, else the untrained base.

    Raises:
        ValueError: If there is no such method.
    """
    decided: dict[tuple[str, str], dict[int, Decisions]] = defaultdict(dict)
    probed: dict[str, str] = {}
    for run in runs:
        for one in run.methods:
            for split, decisions in one.decisions.items():
                if split != CALIBRATION_SPLIT:
                    name = f"{run.pipeline}: {one.method.name}"
                    decided[name, split][run.seed] = decisions
                    if one.method.probe_of is not None:
                        probed[name] = f"{run.pipeline}: {one.method.probe_of}"
    names = list(dict.fromkeys(name for name, _ in decided))
    reference = _reference([name for name in names if name not in probed], against)
    found = []
    for (first, split), by_seed in decided.items():
        second = probed.get(first, reference)
        other = decided.get((second, split), {})
        seeds = sorted(by_seed.keys() & other.keys())
        if first != second and seeds:
            difference = compare([by_seed[s] for s in seeds], [other[s] for s in seeds])
            found.append(Comparison(first, second, split, difference))
    return found


def write_evaluation(path: Path, rows: Sequence[EvaluationRow], comparisons: Sequence[Comparison]) -> None:
    """Writes rows and comparisons as JSON."""
    content = {"rows": [asdict(row) for row in rows], "comparisons": [asdict(one) for one in comparisons]}
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def command_line(command: str, argv: Sequence[str]) -> str:
    """Returns the command that was given, to show how to go on."""
    return shlex.join(["vidreason", command, *argv])


def _read(run: Path, plan: EvaluationPlan, pipeline: PipelineRun, label_names: tuple[str, ...]) -> EvaluatedRun:
    methods: dict[str, Evaluated] = {}
    for method in plan.methods:
        record = pipeline.state.stages[method.test]
        path = artefact_path(run / EVALUATION_FOLDER / record.folder, "predictions")
        assert path is not None, "a finished test stage has its predictions"
        own = methods.get(method.probe_of or "")
        temperature = None if own is None else own.temperature
        methods[method.name] = Evaluated.read(method, path, label_names, record.wall_seconds, temperature)
    name = plan.spec.name.removesuffix("_evaluation")
    return EvaluatedRun(run, name, plan.spec.seed, tuple(methods.values()), label_names)


def _data_of(run: Path) -> VideoDataModule:
    """Returns the data module of a run, set up."""
    from vidreason.config import trainer_cli

    folder = finished_stages(run)[2][-1][1].folder
    with quietly():
        data = trainer_cli.build("test", ["--config", str(folder / CONFIG_FILE)]).datamodule
        assert isinstance(data, VideoDataModule)
        data.prepare_data()
        data.setup("test")
    return data


def _reference(names: Sequence[str], against: str | None) -> str:
    """Returns the full name of the method that others are compared with."""
    if against is not None:
        matches = [name for name in names if against in (name, name.partition(": ")[2])]
        if len(matches) != 1:
            what = "several pipelines have it" if matches else "no such method"
            raise ValueError(f"--against {against!r}: {what}; there are {'; '.join(names)}")
        return matches[0]
    several = len({name.partition(": ")[0] for name in names}) > 1
    preferred = [name for name in LABEL_SFT if name in names and several]
    return next(iter(preferred or [name for name in names if name.endswith(": zero_shot likelihood")]), names[0])
