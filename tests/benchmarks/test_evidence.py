"""The evidence script: its settings, the diagnosis of traces, and the report against hand-made figures."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evidence import Work
from evidence_report import FoundRun, diagnose, draw, report
from scipy import stats

from vidreason.datamodules.porch.data import PorchDataModule
from vidreason.datamodules.porch.texts import rationale
from vidreason.datamodules.porch.world import draw_facts, label_of, stream
from vidreason.evaluation.decisions import Decisions
from vidreason.evaluation.plan import Method
from vidreason.evaluation.rows import Evaluated
from vidreason.evaluation.run import EvaluatedRun
from vidreason.lightning_modules.decisions.predictions import Prediction, Trace
from vidreason.pipelines.call import read_call


@pytest.mark.parametrize("method", ["label_sft", "rb_ft", "deepintuit"])
def test_every_option_is_one_of_the_pipeline(method: str) -> None:
    spec = read_call(list(Work(method, 256, 3, "mono", Path("r")).options((0, 1), 400, 80))).spec
    assert spec.seed == 3
    given = {key.rpartition(".")[2]: value for key, value in spec.args.items()}
    assert (given["train_clips"], given["cal_clips"], given["test_clips"]) == (256, 128, [80, 400])


def test_a_level_has_its_own_number_of_clips() -> None:
    data = PorchDataModule(train_clips=1, val_clips=1, cal_clips=1, levels=(0, 1), test_clips=[2, 6])
    assert [item.split for item in data._items()].count("test_L1") == 6
    with pytest.raises(ValueError, match="one for each of the levels"):
        PorchDataModule(levels=(0, 1), test_clips=[2])


def prediction(name: str, text: str, answer: str, label: str) -> Prediction:
    trace = Trace(text, answer, 10)
    return Prediction(name, "test_L1", name, label, answer, {}, answer, False, False, (trace,))


def test_the_diagnosis_tells_wrong_facts_from_wrong_decisions() -> None:
    rng = stream(7, "test", 0, 0, "texts")
    theft = draw_facts(stream(7, "test", 0, 0, "facts"), "theft")
    visit = draw_facts(stream(7, "test", 0, 1, "facts"), "visit")
    truth = {name: theft.as_dict() for name in "abc"}
    found = diagnose(
        [
            prediction("a", rationale(theft, rng), "theft", "theft"),  # all right
            prediction("b", rationale(theft, rng), "visit", "theft"),  # right facts, wrong decision
            prediction("c", rationale(visit, rng), "theft", "theft"),  # wrong facts, right by luck
        ],
        truth,
    )
    assert label_of(visit) == "visit"
    assert found.facts_right == pytest.approx(2 / 3)
    assert found.rule_right == pytest.approx(2 / 3)
    assert found.answer_right == pytest.approx(2 / 3)
    assert found.answer_given_facts == pytest.approx(1 / 2)


def decided(right: list[int], seed: int) -> Decisions:
    n = len(right)
    probs = np.array([[0.8, 0.2] if hit else [0.2, 0.8] for hit in right])
    names = tuple(f"{seed}-{i}" for i in range(n))
    pred = np.array([1 - hit for hit in right])
    return Decisions(names, names, ("x", "y"), np.zeros(n, dtype=np.int64), pred, probs, probs.max(1), 5.0)


def run_of(pipeline: str, method: str, right: list[int], seed: int) -> FoundRun:
    one = Evaluated(Method(method, "likelihood", "t", 0), {"test_L1": decided(right, seed)}, 1.0, 0.1)
    return FoundRun(EvaluatedRun(Path("r"), pipeline, seed, (one,), ("x", "y")), 128, Path("w"), 60.0)


def test_differences_are_paired_by_seed_and_nothing_is_pooled_but_the_calibration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rights = {0: ([1, 1, 1, 0], [1, 0, 0, 0]), 1: ([1, 1, 0, 0], [1, 0, 0, 0]), 2: ([1, 1, 1, 1], [0, 1, 1, 0])}
    runs = []
    for seed, (reasoned, labelled) in rights.items():
        runs.append(run_of("deepintuit", "calibration 4 traces", reasoned, seed))
        runs.append(run_of("label_sft", "sft_label likelihood", labelled, seed))
    content = json.loads(json.dumps(report(runs)))
    (difference,) = content["differences"]
    each = np.array([0.5, 0.25, 0.5])
    half = stats.t.ppf(0.975, 2) * each.std(ddof=1) / np.sqrt(3)
    assert difference["mean"] == pytest.approx(each.mean())
    assert (difference["low"], difference["high"]) == pytest.approx((each.mean() - half, each.mean() + half))
    reasoned = next(row for row in content["means"] if row["pipeline"] == "deepintuit")
    assert reasoned["acc"] == pytest.approx(0.75)
    assert reasoned["ece_pooled"] == pytest.approx(0.8 - 9 / 12, abs=1e-5)  # one bin: confidence 0.8, 9 of 12 right
    assert len(content["rows"]) == 6
    printed = capsys.readouterr().out
    assert "could show" in printed
    mean = np.array([0.75, 0.5, 1.0])
    half = stats.t.ppf(0.975, 2) * mean.std(ddof=1) / np.sqrt(3)
    header, labelled, calibrated = printed.splitlines()[-3:]
    assert header.split() == ["128", "labelled", "clips", "L1"]
    assert labelled.startswith("label SFT ")
    cell = f"75.0 ({100 * (0.75 - half):.0f}-{100 * (0.75 + half):.0f})"
    assert calibrated.split("  ")[0] == "DeepIntuit, calibrated"
    assert calibrated.endswith(cell)
    draw(content, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_results_of_several_files_are_reported_together() -> None:
    files = []
    for labels in (128, 256):
        runs = [replace(run_of("label_sft", "sft_label likelihood", [1, seed], seed), labels=labels) for seed in (0, 1)]
        files.append({"date": "d", "versions": {}, "command": f"--labels {labels}", **report(runs)})
    together = report([], files)
    assert [row["labels"] for row in together["means"]] == [128, 256]
    assert [one["command"] for one in together["of"]] == ["--labels 128", "--labels 256"]
    assert together["rows"] == files[0]["rows"] + files[1]["rows"]
    with pytest.raises(ValueError, match="label_sft 128 seed 0 has results in two places"):
        report([], [files[0], files[0]])
