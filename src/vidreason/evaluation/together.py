"""Checks that runs belong together, so that their decisions can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vidreason.datamodules.task import Task
from vidreason.evaluation.plan import finished_stages
from vidreason.evaluation.run import EvaluatedRun

_OTHER_CLASSES = "has other classes than {}; look at each task by itself"


def check_distinct(folders: Sequence[Path]) -> None:
    """Checks, before anything is decided, what can be told of runs by then: their classes, pipelines and seeds.

    Raises:
        ValueError: If classes differ, two runs have one pipeline and seed, or a run has not finished a training.
    """
    seen, first = dict[tuple[str, int], Path](), tuple[str, ...]()
    for folder in folders:
        name, seed, stages = finished_stages(folder)
        names = Task.from_yaml(stages[-1][1].task_file).label_names
        first = first or names
        if names != first:
            raise ValueError(f"{folder}: {_OTHER_CLASSES.format(folders[0])}")
        _check_new((name, seed), folder, seen)


def check_together(runs: Sequence[EvaluatedRun]) -> None:
    """Checks that runs can be compared.

    Raises:
        ValueError: If their classes differ, a run is given twice, or a clip has another label in another run.
    """
    first, seen = runs[0], dict[tuple[str, int], Path]()
    labels: dict[tuple[str, str], int] = {}
    for run in runs:
        if run.label_names != first.label_names:
            raise ValueError(f"{run.folder}: {_OTHER_CLASSES.format(first.folder)}")
        _check_new((run.pipeline, run.seed), run.folder, seen)
        for one in run.methods:
            for split, decisions in one.decisions.items():
                for name, label in zip(decisions.ids, decisions.labels.tolist(), strict=True):
                    if labels.setdefault((split, name), label) != label:
                        raise ValueError(
                            f"{run.folder}: clip {name} of {split} has another label than in the other runs, so that "
                            "it is another clip; look at each set of clips by itself"
                        )


def _check_new(key: tuple[str, int], folder: Path, seen: dict[tuple[str, int], Path]) -> None:
    if key in seen:
        raise ValueError(f"{folder}: is {key[0]} with seed {key[1]}, like {seen[key]}; leave one of them out")
    seen[key] = folder
