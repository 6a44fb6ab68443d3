"""Scores of decisions against scikit-learn, against slow loops and against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from drawn_decisions import NAMES, drawn
from sklearn import metrics

from vidreason.evaluation.decisions import UNDECIDED, Decisions
from vidreason.evaluation.scores import (
    adaptive_calibration_error,
    area_under_risk_coverage,
    coverage_at,
    error_of_calibrated,
    expected_calibration_error,
    per_class,
    scores,
)
from vidreason.lightning_modules.decisions.predictions import Prediction, Trace


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_equal_those_of_scikit_learn(classes: int) -> None:
    d = drawn(300, classes)
    assert d.probs is not None
    ours, rows = scores(d), list(range(classes))
    expected = {
        "acc": metrics.accuracy_score(d.labels, d.pred),
        "balanced_acc": metrics.balanced_accuracy_score(d.labels, d.pred),
        "macro_f1": metrics.f1_score(d.labels, d.pred, average="macro"),
        "nll": metrics.log_loss(d.labels, d.probs, labels=rows),
        "auroc": metrics.roc_auc_score(d.labels, d.probs[:, 1])
        if classes == 2
        else metrics.roc_auc_score(d.labels, d.probs, multi_class="ovr"),
        "brier": sum(metrics.brier_score_loss(d.labels == c, d.probs[:, c]) for c in rows),
    }
    assert {name: ours[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    table = metrics.classification_report(d.labels, d.pred, output_dict=True)
    for c, (name, found) in enumerate(per_class(d).items()):
        assert name == NAMES[c]
        assert found["precision"] == pytest.approx(table[str(c)]["precision"])
        assert found["recall"] == pytest.approx(table[str(c)]["recall"])
        assert (found["f1"], found["clips"]) == (pytest.approx(table[str(c)]["f1-score"]), table[str(c)]["support"])


def test_a_clip_without_decision_is_wrong_and_stays_in_every_denominator() -> None:
    decided, undecided = scores(drawn(50)), scores(drawn(50, undecided=10))
    right = drawn(50).right
    assert undecided["acc"] == pytest.approx(right[10:].sum() / 50)
    assert undecided["unparsed"] == pytest.approx(0.2)
    assert decided["unparsed"] == 0.0


def slow_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Returns the ECE by a loop over bins [k / bins, (k + 1) / bins)."""
    total = 0.0
    for k in range(bins):
        own = [i for i, c in enumerate(confidence) if k / bins <= min(c, 1 - 1e-9) < (k + 1) / bins]
        if own:
            total += abs(sum(right[own]) - sum(confidence[own]))
    return total / len(confidence)


def test_calibration_error_equals_a_loop_over_bins() -> None:
    d = drawn(400)
    assert d.confidence is not None
    right = d.right.astype(float)
    assert expected_calibration_error(d.confidence, right) == pytest.approx(
        slow_calibration_error(d.confidence, right), abs=1e-6
    )


def test_a_confidence_of_one_shares_the_last_bin() -> None:
    confidence, right = np.array([1.0, 0.96]), np.array([0.0, 1.0])
    # One bin: |(1 - 1.96)| / 2. With a bin of its own for 1.0, torchmetrics would give (1.0 + 0.04) / 2 = 0.52.
    assert expected_calibration_error(confidence, right) == pytest.approx(0.48, abs=1e-6)


def test_adaptive_calibration_error_by_hand() -> None:
    confidence, right = np.array([0.6] * 15 + [0.9] * 15), np.array([0.0, 1.0] * 15)
    # 15 bins of 2 clips: 7 at 0.6 and 7 at 0.9 with half right, one with both.
    bins = [(confidence[k : k + 2].mean(), right[k : k + 2].mean()) for k in range(0, 30, 2)]
    assert adaptive_calibration_error(confidence, right) == pytest.approx(sum(abs(c - r) for c, r in bins) / 15)


def test_a_calibrated_model_has_an_error_above_zero_that_shrinks_with_clips() -> None:
    generator = np.random.default_rng(0)
    few, many = generator.uniform(0.5, 1, 40), generator.uniform(0.5, 1, 4000)
    right = (generator.random(4000) < many).astype(float)
    assert error_of_calibrated(few) > 3 * error_of_calibrated(many) > 0
    assert expected_calibration_error(many, right) == pytest.approx(error_of_calibrated(many), abs=0.01)


def test_risk_and_coverage_by_hand() -> None:
    confidence, right = np.array([0.9, 0.8, 0.8, 0.6, 0.5]), np.array([1.0, 1.0, 0.0, 1.0, 0.0])
    # Errors among the k surest, ties with their mean: 0, 0.5/2, 1/3, 1/4, 2/5.
    assert area_under_risk_coverage(confidence, right) == pytest.approx((0 + 0.25 + 1 / 3 + 0.25 + 0.4) / 5)
    assert coverage_at(0.05, confidence, right) == pytest.approx(0.2)
    assert coverage_at(0.25, confidence, right) == pytest.approx(0.8)
    assert coverage_at(0.05, confidence[::-1], 1 - right[::-1]) == 0.0


def test_a_vote_has_a_share_and_no_probability() -> None:
    answers = [("fall", "sit", "fall"), ("fly", None, "walk"), (None, None, None)]
    predictions = [
        Prediction(
            f"c{i}",
            "test",
            "",
            "fall",
            None,
            {},
            None,
            False,
            False,
            tuple(Trace(f"{a}", a, 10 * (i + 1)) for a in row),
        )
        for i, row in enumerate(answers)
    ]
    vote = Decisions.vote(predictions, NAMES, 3)
    assert vote.pred.tolist() == [0, 2, UNDECIDED]
    assert vote.probs is None
    assert vote.confidence is not None
    assert vote.confidence.tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert vote.tokens == pytest.approx((30 + 60 + 90) / 3)
    found = scores(vote)
    assert found["ece"] is found["nll"] is found["brier"] is found["auroc"] is None
    assert found["aurc"] is not None
    single = Decisions.vote(predictions, NAMES, 1)
    assert single.confidence is None
    assert scores(single)["aurc"] is None


def test_scaling_by_a_temperature_is_undone_by_its_inverse_and_keeps_decisions() -> None:
    d = drawn(20)
    assert d.probs is not None
    sharp = d.scaled(0.5)
    assert sharp.probs is not None
    assert sharp.confidence is not None
    assert d.confidence is not None
    squares = d.probs**2 / (d.probs**2).sum(1, keepdims=True)
    assert sharp.probs == pytest.approx(squares)
    assert (sharp.confidence >= d.confidence - 1e-12).all()
    again = sharp.scaled(2.0).probs
    assert again is not None
    assert again == pytest.approx(d.probs)
