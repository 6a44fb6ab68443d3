"""An evaluated run made by hand: what a reasoner and its calibrator decided about 24 clips, with hostile texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

import yaml

from vidreason.evaluation.plan import MODES, Method, plan_evaluation
from vidreason.evaluation.rows import Evaluated
from vidreason.evaluation.run import EVALUATION_FILE, EvaluatedRun, compare_methods, rows_of_run, write_evaluation

CLIPS = 24
LABELS = ('fall <2 m & "x"', "walk")
TRACE = "<think></pre></script><img src=x onerror=alert(1)> {{ 7 * 7 }}</think><answer>{}</answer>"
QUESTION = "Is <script>alert(2)</script> there?"
RIGHT = {
    "zero_shot likelihood": 12,
    "cold answer": 16,
    "cold vote of 2": 18,
    "calibration 2 traces": 22,
    "calibration 2 traces, no video": 22,
}
"""Right decisions of 24 by method; 15 for others."""


def clip_name(split: str, number: int) -> str:
    return f'{split}"><script>{number}</script>'


def write_run(
    run: Path,
    right: Mapping[str, int] = RIGHT,
    pipeline: str = "deepintuit",
    seed: int = 0,
    trainings: Sequence[str] = ("cold", "calibration"),
) -> Path:
    """Writes the folder of a finished and evaluated pipeline, which ends with its trainings."""
    stages = {}
    for number, name in enumerate(trainings, 1):
        folder = run / "stages" / f"{number:02d}_{name}"
        (folder / "adapter").mkdir(parents=True)
        calibrates = name.startswith("calibration")
        info = {"stage": "calibration" if calibrates else name, "temperature": 2.0, "parent_sha": "0" * 64}
        (folder / "adapter" / "vidreason.json").write_text(json.dumps(info))
        init: dict[str, object] = {"adapter_path": None, "decide": {"by": "answer"}}
        init["rewards"] = [{"class_path": "vidreason.rewards.accuracy.AccuracyReward", "init_args": {"weight": 2.0}}]
        if calibrates:
            init = {"adapter_path": None, "calibrator_path": None, "traces": {"samples": 2}}
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": init}}))
        (folder / "finished.json").write_text("{}")
        (folder / "command.txt").write_text("vidreason fit --config '<i>.yaml'\n")
        task = {"name": "hostile", "question": QUESTION, "classes": [{"name": name} for name in LABELS]}
        (folder / "task.yaml").write_text(yaml.safe_dump(task))
        stages[name] = _record(f"stages/{number:02d}_{name}", "fit")
    _write_state(run, pipeline, stages)
    (run / "pipeline.yaml").write_text(yaml.safe_dump({"seed": seed, "stages": []}))
    (run / "summary.json").write_text(json.dumps([{"note": "cold wrote no language about these clips"}]))
    plan = plan_evaluation(run, ["cal", "test"], MODES, 2, probes=True)
    tests, methods = {}, list[Evaluated]()
    for method in plan.methods:
        folder = run / "evaluation" / "stages" / method.test
        folder.mkdir(parents=True)
        lines = [
            _line(method, split, number, right.get(method.name, 15))
            for split in (["test"] if method.probe_of else ["cal", "test"])
            for number in range(CLIPS)
        ]
        (folder / "predictions.jsonl").write_text("".join(lines))
        tests[method.test] = _record(f"stages/{method.test}", "test")
        own = next((one.temperature for one in methods if one.method.name == method.probe_of), None)
        methods.append(Evaluated.read(method, folder / "predictions.jsonl", LABELS, 12.0, own))
    _write_state(run / "evaluation", f"{pipeline}_evaluation", tests)
    found = EvaluatedRun(run, pipeline, seed, tuple(methods), LABELS)
    with patch("vidreason.evaluation.scores._DRAWS", 1), patch("vidreason.evaluation.intervals.DRAWS", 50):
        rows = rows_of_run(found, by_group=False)
    write_evaluation(run / "evaluation" / EVALUATION_FILE, rows, compare_methods([found], None))
    return run


def _line(method: Method, split: str, number: int, right: int) -> str:
    label = LABELS[number % 2]
    pred = label if number < right else LABELS[1 - number % 2]
    # The last clips, which are wrong, are the surest.
    sure = 0.6 + 0.01 * number
    probs = {name: sure if name == pred else 1 - sure for name in LABELS}
    texts = [{"text": TRACE.replace("{}", pred), "answer": pred, "n_tokens": 5}] * method.samples
    row: dict[str, object] = {"video_id": clip_name(split, number), "split": split, "group": "", "label": label}
    row |= {"pred": pred, "probs": probs, "answer": pred, "unparsed": False, "failed": False, "traces": texts}
    return json.dumps(row) + "\n"


def _record(folder: str, command: str) -> dict[str, object]:
    return {"status": "finished", "folder": folder, "inputs": {"vidreason": "0.1"}, "command": [command]}


def _write_state(folder: Path, pipeline: str, stages: Mapping[str, object]) -> None:
    state = {"vidreason_state": 1, "pipeline": pipeline, "train_clips": 24, "stages": stages}
    (folder / "state.json").write_text(json.dumps(state))
