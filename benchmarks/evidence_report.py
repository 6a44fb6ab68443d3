"""The report of ``evidence.py``: rows per run, means over seeds, paired differences, and the figure.

Facts and rules serve as a diagnosis of the embedded world's traces: no stage reads them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vidreason.datamodules.porch.texts import read_facts
from vidreason.datamodules.porch.world import Facts, label_of
from vidreason.datamodules.split_names import CALIBRATION_SPLIT
from vidreason.evaluation.decisions import Decisions
from vidreason.evaluation.intervals import compare, over_seeds
from vidreason.evaluation.rows import Evaluated
from vidreason.evaluation.run import EvaluatedRun
from vidreason.evaluation.scores import error_of_calibrated, expected_calibration_error, scores
from vidreason.lightning_modules.decisions.predictions import Prediction, read_predictions
from vidreason.run_folder import RunState, artefact_path

Key = tuple[str, str, int, str]
"""Pipeline, method, labelled training clips, split."""
PAIRS = (
    ("deepintuit: calibration 4 traces", "label_sft: sft_label likelihood"),
    ("deepintuit: grpo answer", "deepintuit: sft_cold_start answer"),
    ("deepintuit: calibration 4 traces", "deepintuit: calibration 1 trace"),
    ("rb_ft: sft_label likelihood", "label_sft: sft_label likelihood"),
)
"""Differences that the claim is about: first minus second."""
CURVES = (
    "label_sft: zero_shot likelihood",
    "label_sft: sft_label likelihood",
    "rb_ft: sft_label likelihood",
    "deepintuit: calibration 4 traces",
)

LINES = {
    "zero-shot": "label_sft: zero_shot likelihood",
    "label SFT": "label_sft: sft_label likelihood",
    "RB-FT": "rb_ft: sft_label likelihood",
    "DeepIntuit, cold start": "deepintuit: sft_cold_start answer",
    "DeepIntuit, GRPO": "deepintuit: grpo answer",
    "DeepIntuit, calibrated": "deepintuit: calibration 4 traces",
}
"""Lines of the table of accuracies: what they are called, and pipeline and method."""


@dataclass(frozen=True)
class FoundRun:
    """A finished run with its evaluation."""

    run: EvaluatedRun
    labels: int
    """Labelled training clips."""
    world: Path
    """Folder with the rendered clips."""
    seconds: float
    """Wall time of all stages of the pipeline."""


@dataclass(frozen=True)
class Diagnosis:
    """Shares of the clips that show at which step a reasoning stage loses its answers."""

    facts_right: float
    """All eight facts stated as they are."""
    rule_right: float
    """The world's decision list, applied to the stated facts, gives the label."""
    answer_right: float
    answer_given_facts: float | None
    """Right answers among the clips whose facts are all right; None without such clips."""


def report(found: Sequence[FoundRun], earlier: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Returns the content of the JSON file, and prints its tables.

    Args:
        found: The runs.
        earlier: Contents of JSON files about other pipelines or numbers of labelled clips, which go into the new one.

    Raises:
        ValueError: If two of them are about the same runs, whose means would have to be computed again.
    """
    rows, decided = [], defaultdict[Key, dict[int, tuple[Evaluated, Decisions]]](dict)
    for one in found:
        for method in one.run.methods:
            for split, decisions in method.decisions.items():
                if split != CALIBRATION_SPLIT:
                    rows.append(_row(one, method, split, decisions))
                    key = (one.run.pipeline, method.method.name, one.labels, split)
                    decided[key][one.run.seed] = (method, decisions)
    content = {
        "means": [_mean(key, by_seed) for key, by_seed in decided.items()],
        "differences": _differences(decided),
        "seconds": {f"{one.run.pipeline} {one.labels} seed {one.run.seed}": round(one.seconds, 1) for one in found},
        "rows": rows,
    }
    for one in earlier:
        if both := content["seconds"].keys() & one["seconds"].keys():
            raise ValueError(f"{sorted(both)[0]} has results in two places")
        content |= {key: [*content[key], *one[key]] for key in ("means", "differences", "rows")}
        content["seconds"] |= one["seconds"]
        content["of"] = [*content.get("of", []), {key: one[key] for key in ("date", "versions", "command")}]
    for row in content["means"]:
        print(_line(row))
    for row in content["differences"]:
        print(difference_line(row))
    for number in sorted({row["labels"] for row in content["rows"]}):
        print(accuracy_table(content, number))
    return content


def accuracy_table(content: Mapping[str, Any], labels: int) -> str:
    """Returns the accuracies with one number of labelled clips: mean over seeds and its 95 % interval, in %, by level.

    Args:
        content: The content of the JSON file.
        labels: Number of labelled training clips.
    """
    rows = [row for row in content["means"] if row["labels"] == labels]
    levels = sorted({row["split"] for row in rows})
    lines = [f"{f'{labels} labelled clips':24s}" + "".join(f"{split.removeprefix('test_'):>18s}" for split in levels)]
    for name, key in LINES.items():
        found = {row["split"]: row for row in rows if f"{row['pipeline']}: {row['method']}" == key}
        if found:
            lines.append(f"{name:24s}" + "".join(f"{_cell(found.get(split)):>18s}" for split in levels))
    return "\n".join(lines)


def diagnose(predictions: Sequence[Prediction], truth: Mapping[str, Mapping[str, str]]) -> Diagnosis:
    """Compares the facts that the first trace of each clip states with the true ones.

    Args:
        predictions: Predictions with traces.
        truth: Facts by video id.
    """
    facts = rule = right = both = 0
    for prediction in predictions:
        true = truth[prediction.video_id]
        stated = read_facts(prediction.traces[0].text if prediction.traces else "")
        all_right = all(stated[name] == value for name, value in true.items())
        # a fact that is not stated fits no rule
        ruled = label_of(Facts(**{name: value or "" for name, value in stated.items()}))
        facts += all_right
        rule += ruled == label_of(Facts(**true))
        right += prediction.right
        both += prediction.right and all_right
    n = len(predictions)
    return Diagnosis(facts / n, rule / n, right / n, both / facts if facts else None)


def difference_line(row: Mapping[str, Any]) -> str:
    """Returns one difference in words, in points."""
    text = f"{row['first']} - {row['second']}, {row['labels']} labels, {row['split']}: {100 * row['mean']:+.1f}"
    if row["low"] is not None:
        text += f" ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
    return f"{text}, {row['seeds']} seeds x {row['clips']} clips, could show {100 * row['detectable']:.1f}"


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Draws accuracy against the level with the most labelled clips, and at L1 against labelled clips if they vary.

    Args:
        content: The content of the JSON file.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    means = {(f"{row['pipeline']}: {row['method']}", row["labels"], row["split"]): row for row in content["means"]}
    labels = sorted({key[1] for key in means})
    levels = sorted({key[2] for key in means})
    titles, several = {key: title for title, key in LINES.items()}, len(labels) > 1
    figure = Figure(figsize=(9 if several else 6, 4), layout="constrained")
    *left, right = figure.subplots(1, 1 + several, sharey=True, squeeze=False)[0]
    for name in CURVES:
        shown_in = [(axes, [(name, number, "test_L1") for number in labels]) for axes in left]
        for axes, keys in [*shown_in, (right, [(name, labels[-1], level) for level in levels])]:
            at = [place for place, key in enumerate(keys) if key in means]
            shown = [means[keys[place]] for place in at]
            y = np.array([100 * row["acc"] for row in shown])
            low, high = (np.array([100 * (row[side] or row["acc"]) for row in shown]) for side in ("low", "high"))
            if at:
                axes.errorbar(at, y, yerr=[y - low, high - y], marker="o", capsize=3, label=titles[name])
    for axes in left:
        axes.set_xticks(range(len(labels)), [str(number) for number in labels])
        axes.set_xlabel("labelled training clips (test level L1)")
    first = [*left, right][0]
    first.set_ylabel("accuracy %, 95 % interval over seeds")
    right.set_xticks(range(len(levels)), [level.removeprefix("test_") for level in levels])
    right.set_xlabel(f"level of openness ({labels[-1]} labelled training clips)")
    first.set_ylim(0, 100)
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _row(one: FoundRun, method: Evaluated, split: str, decisions: Decisions) -> dict[str, Any]:
    own = scores(decisions)
    scaled = None if method.temperature is None else scores(decisions.scaled(method.temperature))
    row = {
        "pipeline": one.run.pipeline,
        "method": method.method.name,
        "labels": one.labels,
        "seed": one.run.seed,
        "split": split,
        "clips": len(decisions),
        "acc": own["acc"],
        "ece": own["ece"],
        "temperature": method.temperature,
        "ece_scaled": None if scaled is None else scaled["ece"],
        "ece_if_calibrated": None if scaled is None else scaled["ece_if_calibrated"],
        "tokens_per_clip": decisions.tokens,
        "seconds_per_clip": method.seconds_per_clip,
    }
    if method.method.mode == "answer":
        row["diagnosis"] = asdict(diagnose(_predictions(one.run.folder, method.method.test, split), _facts(one.world)))
    return row


def _mean(key: Key, by_seed: Mapping[int, tuple[Evaluated, Decisions]]) -> dict[str, Any]:
    """Returns accuracy over seeds with its Student-t interval, and the ECE of the pooled clips, scaled by seed."""
    pipeline, method, labels, split = key
    mean, interval = over_seeds([float(decisions.right.mean()) for _, decisions in by_seed.values()])
    scaled = [decisions.scaled(one.temperature) for one, decisions in by_seed.values() if one.temperature is not None]
    sure = [one.confidence for one in scaled if one.confidence is not None]
    row: dict[str, Any] = {
        "pipeline": pipeline,
        "method": method,
        "labels": labels,
        "split": split,
        "seeds": sorted(by_seed),
        "clips_per_seed": len(next(iter(by_seed.values()))[1]),
        "acc": mean,
        "low": None if interval is None else interval[0],
        "high": None if interval is None else interval[1],
        "ece_pooled": None,
        "ece_if_calibrated": None,
    }
    if sure:
        confidence = np.concatenate(sure)
        right = np.concatenate([one.right for one in scaled]).astype(np.float64)
        row["ece_pooled"] = expected_calibration_error(confidence, right)
        row["ece_if_calibrated"] = error_of_calibrated(confidence)
    return row


def _differences(decided: Mapping[Key, Mapping[int, tuple[Evaluated, Decisions]]]) -> list[dict[str, Any]]:
    found = []
    for first, second in PAIRS:
        for (pipeline, method, labels, split), by_seed in decided.items():
            other_pipeline, _, other_method = second.partition(": ")
            other = decided.get((other_pipeline, other_method, labels, split), {})
            seeds = sorted(by_seed.keys() & other.keys())
            if f"{pipeline}: {method}" == first and seeds:
                difference = compare([by_seed[s][1] for s in seeds], [other[s][1] for s in seeds])
                row = {"first": first, "second": second, "labels": labels, "split": split, **asdict(difference)}
                found.append(row)
    return found


def _predictions(run: Path, test: str, split: str) -> list[Prediction]:
    """Returns the predictions of a test stage of a run's evaluation about one split."""
    state = RunState.load(run / "evaluation")
    assert state is not None, f"{run} has been evaluated"
    path = artefact_path(run / "evaluation" / state.stages[test].folder, "predictions")
    assert path is not None, f"{test} has finished"
    return [prediction for prediction in read_predictions(path) if prediction.split == split]


def _facts(world: Path) -> dict[str, dict[str, str]]:
    (file,) = world.glob("porch/*/facts.jsonl")  # One world for each folder: camera, labels and seed are in its path.
    return {row["video_id"]: row["facts"] for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    interval = "" if row["low"] is None else f" ({100 * row['low']:.0f}-{100 * row['high']:.0f})"
    return f"{100 * row['acc']:.1f}{interval}"


def _line(row: Mapping[str, Any]) -> str:
    name = f"{row['pipeline']}: {row['method']}"
    text = f"{name:40s} {row['labels']:4d} labels {row['split']:8s} {100 * row['acc']:5.1f} %"
    if row["low"] is not None:
        text += f" ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
    if row["ece_pooled"] is not None:
        text += f", ECE {row['ece_pooled']:.3f} (if calibrated {row['ece_if_calibrated']:.3f})"
    return f"{text}, seeds {row['seeds']}"
