"""Scores of decisions: right or wrong, how good the probabilities are, and what a threshold on them would give.

Shape letters: N clips, C classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_calibration_error,
    multiclass_auroc,
    multiclass_confusion_matrix,
)

from vidreason.evaluation.decisions import UNDECIDED, Decisions, Floats, Ints
from vidreason.lightning_modules.decisions.metrics import CountScores
from vidreason.lightning_modules.functional.calibration import brier, nll

BINS = 15
"""Bins of the expected calibration error."""
BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
"""Largest confidence that torchmetrics puts into the last bin; it gives a confidence of 1 a bin of its own."""
_DRAWS = 200


def scores(decisions: Decisions) -> dict[str, float | None]:
    """Computes every score of one method on one split.

    Returns:
        ``acc``, ``balanced_acc`` (mean recall of the classes that have clips), ``macro_f1`` (mean over the classes that
        have clips or decisions), ``unparsed`` (share without a decision), and None where the method has no
        probabilities: ``auroc`` (of the second of two classes, else the mean of one against the rest), ``nll`` in nats,
        ``brier`` (summed over classes), ``ece`` (15 equally wide bins), ``ece_if_calibrated``, ``adaptive_ece`` (15
        bins of equal size); and None where it has no confidence: ``confidence`` (mean), ``aurc``, ``coverage_at_5`` and
        ``coverage_at_10``.
    """
    found = CountScores.of(torch.from_numpy(confusion(decisions)).double())
    return {
        "acc": float(found.acc),
        "balanced_acc": float(found.balanced_acc),
        "macro_f1": float(found.macro_f1),
        "unparsed": float(found.unparsed_rate),
        **_probability_scores(decisions),
        **_confidence_scores(decisions),
    }


def per_class(decisions: Decisions) -> dict[str, dict[str, float | int | None]]:
    """Returns precision, recall, F1 and number of clips by class; None for a ratio without a denominator."""
    counts = confusion(decisions)
    found: dict[str, dict[str, float | int | None]] = {}
    for c, name in enumerate(decisions.label_names):
        hits, labelled, chosen = int(counts[c, c]), int(counts[c].sum()), int(counts[:, c].sum())
        found[name] = {
            "clips": labelled,
            "precision": hits / chosen if chosen else None,
            "recall": hits / labelled if labelled else None,
            "f1": 2 * hits / (labelled + chosen) if labelled + chosen else None,
        }
    return found


def confusion(decisions: Decisions) -> Ints:
    """Returns the counts [C, C + 1] by label (row) and decision (column; the last is "undecided")."""
    classes = len(decisions.label_names)
    pred = np.where(decisions.pred == UNDECIDED, classes, decisions.pred)
    counts = multiclass_confusion_matrix(torch.from_numpy(pred), torch.from_numpy(decisions.labels), classes + 1)
    found: Ints = counts.numpy()[:classes]
    return found


def expected_calibration_error(confidence: Floats, right: Floats) -> float:
    """Returns the expected calibration error over 15 equally wide bins (Guo et al., arXiv 1706.04599, equation 3).

    Args:
        confidence: [N] probability of the decision.
        right: [N] 1 where it is right, else 0.
    """
    sure = torch.from_numpy(np.clip(confidence, 0.0, BELOW_ONE)).float().clamp(max=BELOW_ONE)
    return float(binary_calibration_error(sure, torch.from_numpy(right).long(), n_bins=BINS, norm="l1"))


def error_of_calibrated(confidence: Floats, seed: int = 0) -> float:
    """Returns the mean ECE of a perfectly calibrated model with the same confidences.

    It is above 0, because a bin of few clips is hardly ever right exactly as often as its confidence says.
    """
    draws = np.random.default_rng(seed).random((_DRAWS, len(confidence))) < confidence
    return float(np.mean([expected_calibration_error(confidence, row.astype(np.float64)) for row in draws]))


def adaptive_calibration_error(confidence: Floats, right: Floats) -> float:
    """Returns the expected calibration error over 15 bins of equally many clips (Nguyen and O'Connor, 2015)."""
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, BINS) if len(part)]
    gaps = [len(part) * abs(float(confidence[part].mean() - right[part].mean())) for part in parts]
    return sum(gaps) / len(confidence)


def risk_coverage(confidence: Floats, right: Floats) -> tuple[Floats, Floats]:
    """Returns the points of the risk–coverage curve: (coverage, error among the clips that are covered).

    There is one point for each distinct confidence, since a threshold cannot separate clips of equal confidence.
    """
    order = np.argsort(-confidence, kind="stable")
    sure, wrong = confidence[order], 1.0 - right[order]
    ends = np.flatnonzero(np.append(sure[1:] != sure[:-1], True))
    covered = ends + 1.0
    return covered / len(sure), np.cumsum(wrong)[ends] / covered


def area_under_risk_coverage(confidence: Floats, right: Floats) -> float:
    """Returns the mean error among the k surest clips over k = 1 … N (AURC, Geifman and El-Yaniv, arXiv 1805.08206).

    Clips of equal confidence count with their mean error, so that their order does not matter.
    """
    order = np.argsort(-confidence, kind="stable")
    sure, wrong = confidence[order], 1.0 - right[order]
    _, tied, size = np.unique(-sure, return_inverse=True, return_counts=True)
    mean = np.bincount(tied, weights=wrong) / size
    return float(np.mean(np.cumsum(mean[tied]) / np.arange(1, len(wrong) + 1)))


def coverage_at(error: float, confidence: Floats, right: Floats) -> float:
    """Returns the largest share of clips that a threshold can cover with at most this share of errors among them.

    The threshold is chosen on the same clips, so that this describes them and promises nothing about others.
    """
    coverage, risk = risk_coverage(confidence, right)
    return float(max(coverage[risk <= error], default=0.0))


def _probability_scores(decisions: Decisions) -> dict[str, float | None]:
    if decisions.probs is None or decisions.confidence is None:
        return dict.fromkeys(("auroc", "nll", "brier", "ece", "ece_if_calibrated", "adaptive_ece"))
    probs, labels = decisions.probs, decisions.labels
    given, truth = torch.from_numpy(probs), torch.from_numpy(labels)
    right = decisions.right.astype(np.float64)
    return {
        "auroc": _auroc(probs, labels),
        "nll": float(nll(given, truth).mean()),
        "brier": float(brier(given, truth).mean()),
        "ece": expected_calibration_error(decisions.confidence, right),
        "ece_if_calibrated": error_of_calibrated(decisions.confidence),
        "adaptive_ece": adaptive_calibration_error(decisions.confidence, right),
    }


def _confidence_scores(decisions: Decisions) -> dict[str, float | None]:
    if decisions.confidence is None:
        return dict.fromkeys(("confidence", "aurc", "coverage_at_5", "coverage_at_10"))
    right = decisions.right.astype(np.float64)
    return {
        "confidence": float(decisions.confidence.mean()),
        "aurc": area_under_risk_coverage(decisions.confidence, right),
        "coverage_at_5": coverage_at(0.05, decisions.confidence, right),
        "coverage_at_10": coverage_at(0.10, decisions.confidence, right),
    }


def _auroc(probs: Floats, labels: Ints) -> float | None:
    """Returns the area under the ROC curve; None unless every class has a clip."""
    classes = probs.shape[1]
    if len(np.unique(labels)) < classes:
        return None
    target = torch.from_numpy(labels)
    if classes == 2:
        return float(binary_auroc(torch.from_numpy(probs[:, 1]), target))
    return float(multiclass_auroc(torch.from_numpy(probs), target, num_classes=classes, average="macro"))
