"""Summary rows against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from vidreason.lightning_modules.decisions.predictions import Prediction, read_predictions
from vidreason.pipelines.summary import (
    SummaryRow,
    probability_scores,
    recall_and_f1,
    render_summary,
    save_rows,
    summarise_split,
    twin_accuracy,
    wilson_interval,
)
from vidreason.pipelines.table import render_table

KEYS = [
    *("method", "split", "n", "acc", "acc_lo", "acc_hi", "balanced_acc", "macro_f1", "ece", "nll", "brier"),
    *("unparsed_rate", "twin_acc", "train_clips", "cpu_seconds", "gpu_seconds", "seed"),
]


def clip(
    label: str, pred: str | None, confidence: float | None = None, group: str = "", failed: bool = False
) -> Prediction:
    probs = {}
    if confidence is not None and pred is not None:
        probs = {name: confidence if name == pred else (1 - confidence) / 2 for name in ("a", "b", "c")}
    return Prediction("v", "test_L0", group, label, pred, probs, None, pred is None and not failed, failed)


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (8, 10), (1, 1), (37, 80)])
def test_wilson_interval_solves_its_equation(right: int, n: int) -> None:
    """The bounds are where the score test just rejects: |share - p| = z * sqrt(p (1 - p) / n)."""
    low, high = wilson_interval(right, n)
    for bound in (low, high):
        assert abs(right / n - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / n), abs=1e-6)
    assert 0 <= low <= right / n <= high <= 1


def test_wilson_interval_against_published_values() -> None:
    # Newcombe 1998, table I (score method without continuity correction)
    for right, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        assert wilson_interval(right, n) == pytest.approx((low, high), abs=1e-4)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    assert wilson_interval(20, 20)[1] == 1.0


def test_recall_and_f1_by_hand() -> None:
    predictions = [
        *[clip("a", "a")] * 3,
        clip("a", "b"),
        clip("b", "b"),
        clip("b", None),
        clip("b", "c"),
        clip("b", None, failed=True),
    ]
    balanced, f1 = recall_and_f1(predictions)
    assert balanced == pytest.approx((3 / 4 + 1 / 4) / 2)
    # a: 2*3/(4+3); b: 2*1/(4+2); c was predicted but never true: 0
    assert f1 == pytest.approx((6 / 7 + 2 / 6 + 0) / 3)


def test_probability_scores_by_hand() -> None:
    predictions = [clip("a", "a", 0.8), clip("b", "a", 0.8), clip("b", "b", 0.5), clip("c", None)]
    scores = probability_scores(predictions)
    assert scores is not None
    ece, nll, brier = scores
    # bins: two of 0.8 with one right, one of 0.5 right, one of 1/3 wrong (no decision, equal probabilities)
    assert ece == pytest.approx((abs(1.6 - 1) + abs(0.5 - 1) + abs(1 / 3 - 0)) / 4)
    assert nll == pytest.approx(-(math.log(0.8) + math.log(0.1) + math.log(0.5) + math.log(1 / 3)) / 4)
    right, wrong = 0.04 + 2 * 0.01, 0.64 + 0.81 + 0.01
    assert brier == pytest.approx((right + wrong + (0.25 + 2 * 0.0625) + (4 / 9 + 2 / 9)) / 4)
    assert probability_scores([clip("a", "a"), clip("b", None)]) is None


def test_ece_uses_fifteen_bins() -> None:
    apart = [clip("a", "a", 0.60), clip("b", "a", 0.67)]  # [9/15, 10/15) and [10/15, 11/15)
    together = [clip("a", "a", 0.67), clip("b", "a", 0.70)]
    assert probability_scores(apart)[0] == pytest.approx((0.40 + 0.67) / 2)  # type: ignore[index]
    assert probability_scores(together)[0] == pytest.approx(abs(0.67 + 0.70 - 1) / 2)  # type: ignore[index]
    assert probability_scores([clip("a", "a", 1.0)])[0] == pytest.approx(0.0, abs=1e-6)  # type: ignore[index]


def test_a_twin_pair_counts_only_if_both_are_right() -> None:
    pairs = [
        clip("a", "a", group="1"),
        clip("b", "b", group="1"),
        clip("a", "a", group="2"),
        clip("c", "a", group="2"),
        clip("a", "b", group="3"),
        clip("b", "a", group="3"),
    ]
    assert twin_accuracy(pairs) == pytest.approx(1 / 3)
    assert twin_accuracy([*pairs, clip("a", "a", group="4")]) == pytest.approx(1 / 3)  # half a pair
    assert twin_accuracy([clip("a", "a", group="1"), clip("a", "a", group="1")]) is None  # same label
    assert twin_accuracy([clip("a", "a", group="person")] * 3 + pairs) is None  # groups of another kind
    assert twin_accuracy([clip("a", "a", group="same")] * 2 + pairs) is None  # two clips of one label
    assert twin_accuracy([clip("a", "a"), clip("b", "b")]) is None  # no groups


def test_failed_and_unparsed_clips_count_as_wrong() -> None:
    predictions = [clip("a", "a", 0.9), clip("a", None, failed=True), clip("b", None), clip("b", "b", 0.9)]
    row = summarise_split(predictions, method="m", train_clips=3, cpu_seconds=1.26, gpu_seconds=0, seed=2)
    assert (row.n, row.acc, row.unparsed_rate, row.cpu_seconds) == (4, 0.5, 0.5, 1.3)
    assert (row.acc_lo, row.acc_hi) == pytest.approx((0.1500, 0.8500), abs=1e-4)


def test_predictions_are_read_and_a_bad_line_is_named(tmp_path: Path) -> None:
    line: dict[str, object] = {"video_id": "v", "split": "test", "group": "", "label": "a", "pred": None, "probs": None}
    line |= {"answer": None, "unparsed": True, "failed": False, "traces": [{"text": "t", "answer": None}]}
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(line) + "\n" + json.dumps({**line, "label": None}) + "\n")
    (prediction,) = read_predictions(path)  # the unlabelled clip is left out
    assert prediction.traces[0].text == "t"
    assert not prediction.right
    path.write_text(json.dumps(line) + "\n" + json.dumps(line)[:40])
    with pytest.raises(ValueError, match=r"predictions.jsonl, line 2"):
        read_predictions(path)


def test_rows_have_exactly_the_documented_keys(tmp_path: Path) -> None:
    row = summarise_split([clip("a", "a", 0.9), clip("b", "b", 0.9)] * 5, method="m")
    save_rows(tmp_path / "summary.json", [row])
    (saved,) = json.loads((tmp_path / "summary.json").read_text())
    assert list(saved) == KEYS
    noted = SummaryRow(**{**asdict(row), "note": "grpo ended early"})
    save_rows(tmp_path / "summary.json", [noted])
    assert list(json.loads((tmp_path / "summary.json").read_text())[0]) == [*KEYS, "note"]
    text = render_summary([row, noted])
    assert text.splitlines()[-1] == "m: grpo ended early"
    assert "100.0" in text


def test_a_result_that_is_not_better_than_the_majority_class_says_so() -> None:
    # 10 of 15 clips are of class a; of 13 right answers the interval begins at 0.621, of 14 at 0.702
    right = [clip("a", "a")] * 10 + [clip("b", "b")] * 5
    barely = [*right[:13], clip("b", "a"), clip("b", None)]
    row = summarise_split(barely, method="m", note="grpo ended early")
    assert row.acc_lo == pytest.approx(0.621, abs=1e-3)
    assert row.note == (
        "grpo ended early; test_L0: not better than always answering 'a', right in 66.7 %, as far as 15 clips can tell"
    )
    assert render_summary([row]).splitlines()[-1] == f"m: {row.note}"
    assert summarise_split([*right[:14], clip("b", "a")], method="m").note == ""


def test_agrees_with_the_metrics_of_the_test_stage() -> None:
    torch = pytest.importorskip("torch")
    from vidreason.lightning_modules.decisions.metrics import ClassificationMetrics

    names = ("a", "b", "c")
    generator = torch.Generator().manual_seed(0)
    probs = torch.softmax(2 * torch.randn(60, 3, generator=generator), -1)
    labels = torch.randint(3, (60,), generator=generator)
    pred = probs.argmax(-1)
    pred[:5], probs[:5] = -1, 1 / 3
    metrics = ClassificationMetrics(names)
    metrics.update(probs, labels, pred)
    expected = {name: float(value) for name, value in metrics.compute().items()}
    row = summarise_split(
        [
            Prediction(
                video_id="v",
                split="test",
                group="",
                label=names[y],
                pred=names[p] if p >= 0 else None,
                probs=dict(zip(names, q, strict=True)),
                answer=None,
                unparsed=p < 0,
                failed=False,
            )
            for q, y, p in zip(probs.double().tolist(), labels.tolist(), pred.tolist(), strict=True)
        ],
        method="m",
    )
    for key in ("acc", "balanced_acc", "macro_f1", "ece", "nll", "brier", "unparsed_rate"):
        assert getattr(row, key) == pytest.approx(expected[key], abs=1e-5), key


def test_tables_align() -> None:
    lines = render_table(["a", "bb"], [["long", "1"], ["x", "22.5"]]).splitlines()
    assert lines[0] == "a       bb"
    assert len({len(line) for line in lines}) == 1
