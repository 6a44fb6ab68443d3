"""The metrics of a split as one module of torchmetrics objects.

Shape letters: B clips, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryCalibrationError, MulticlassConfusionMatrix

from vidreason.lightning_modules.functional.calibration import brier, nll

UNDECIDED = -1
"""Value of ``pred`` for a clip without a decision."""


class CountScores(NamedTuple):
    """Scores that follow from the counts of a confusion matrix; all [] unless a shape is given."""

    acc: Tensor
    balanced_acc: Tensor
    """Mean recall of the classes that have clips."""
    macro_f1: Tensor
    """Mean F1 of the classes that have clips or decisions, as in scikit-learn."""
    unparsed_rate: Tensor
    """Share of clips without a decision."""
    f1: Tensor
    """[C]; 0 for a class with neither clips nor decisions."""

    @classmethod
    def of(cls, counts: Tensor) -> CountScores:
        """Computes the scores, in float32 of whole numbers and otherwise in the type of ``counts``.

        Args:
            counts: [C, C + 1] by label (row) and decision (column; the last is "undecided"), at least one clip.
        """
        classes = len(counts)
        labelled, decided, hits = counts.sum(1), counts[:, :classes].sum(0), counts.diagonal()
        # 2 hits / (labelled + decided) = 2 P R / (P + R), defined even if P or R is not
        f1 = 2 * hits / (labelled + decided).clamp(min=1)
        recall = hits[labelled > 0] / labelled[labelled > 0]
        total = counts.sum()
        return cls(
            hits.sum() / total, recall.mean(), f1[labelled + decided > 0].mean(), counts[:, classes].sum() / total, f1
        )


class ClassificationMetrics(nn.Module):
    """Accuracy and calibration of decisions over one split; each split has its own object.

    A clip that could not be read, or whose answer could not be parsed, is predicted ``UNDECIDED``: it counts as wrong
    and stays in every denominator. Internally this is a class C, which no label has.

    Args:
        label_names: The C class names.
        calibration_bins: Bins of the expected calibration error.

    Raises:
        ValueError: If there are fewer than two classes.
    """

    def __init__(self, label_names: Sequence[str], calibration_bins: int = 15) -> None:
        super().__init__()
        if len(label_names) < 2:
            raise ValueError(f"metrics need at least two classes, got {list(label_names)}")
        self.label_names = tuple(label_names)
        columns = len(self.label_names) + 1
        self.matrix = MulticlassConfusionMatrix(columns)
        # Binary, over (confidence of the decision, decision is right): the multi-class error would evaluate the class
        # with the highest probability even if there was no decision.
        self.calibration = BinaryCalibrationError(n_bins=calibration_bins, norm="l1")
        self.nll = MeanMetric()
        self.brier = MeanMetric()

    def update(self, probs: Tensor, labels: Tensor, pred: Tensor) -> None:
        """Adds clips.

        Args:
            probs: [B, C] probabilities; uniform for an unreadable clip.
            labels: [B] int64, 0 … C-1.
            pred: [B] int64, the decision, or ``UNDECIDED``.

        Raises:
            ValueError: If shapes do not fit, a clip has no label, or rows of ``probs`` are not probabilities.
        """
        classes = len(self.label_names)
        if probs.shape != (len(labels), classes) or pred.shape != labels.shape or labels.ndim != 1:
            raise ValueError(
                f"expected probs [B, {classes}], labels [B] and pred [B], "
                f"got {tuple(probs.shape)}, {tuple(labels.shape)} and {tuple(pred.shape)}"
            )
        if not len(labels):
            return
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise ValueError(
                f"labels must be 0 … {classes - 1}, got {labels.tolist()}: clips without label have no metrics"
            )
        if int(pred.min()) < UNDECIDED or int(pred.max()) >= classes:
            raise ValueError(f"pred must be {UNDECIDED} … {classes - 1}, got {pred.tolist()}")
        probs = probs.detach().float()
        # Written so that NaN raises too.
        if not bool(((probs.sum(-1) - 1).abs() < 1e-3).all() and (probs >= 0).all()):
            raise ValueError("each row of probs must be non-negative and add up to 1; give a failed clip uniform ones")
        decision = torch.where(pred == UNDECIDED, classes, pred)
        self.matrix.update(decision, labels)
        chosen = probs.gather(-1, pred.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        confidence = torch.where(pred == UNDECIDED, probs.amax(-1), chosen)
        # torchmetrics gives a confidence of 1 a bin of its own, and takes a batch with 1.0000001 for logits.
        self.calibration.update(confidence.clamp(0.0, 1 - 2**-24), (pred == labels).long())
        self.nll.update(nll(probs, labels))
        self.brier.update(brier(probs, labels))

    def compute(self) -> dict[str, Tensor]:
        """Computes the metrics over all added clips of all ranks.

        Returns:
            ``acc``, ``balanced_acc`` (mean recall of the classes that have clips), ``macro_f1`` (mean over the classes
            that have clips or predictions), ``f1/{class}`` (0 for a class with neither), ``unparsed_rate`` (share of
            clips without a decision, including unreadable clips), ``nll`` in nats, ``brier``, ``ece``; all [].

        Raises:
            ValueError: If no clip was added.
        """
        counts = self.confusion()
        if not int(counts.sum()):
            raise ValueError("no clips were counted: metrics need at least one labelled clip")
        if not self.calibration.update_called:  # without this, torchmetrics gathers an empty list of another dtype
            self.calibration.update(counts.new_zeros(0, dtype=torch.float32), counts.new_zeros(0, dtype=torch.int64))
        found = CountScores.of(counts)
        metrics = {
            "acc": found.acc,
            "balanced_acc": found.balanced_acc,
            "macro_f1": found.macro_f1,
            "unparsed_rate": found.unparsed_rate,
            "nll": self.nll.compute(),
            "brier": self.brier.compute(),
            "ece": self.calibration.compute(),
        }
        return metrics | {f"f1/{name}": value for name, value in zip(self.label_names, found.f1.unbind(), strict=True)}

    def confusion(self) -> Tensor:
        """Returns the counts [C, C + 1] int64 by label (row) and decision (column; the last is "undecided")."""
        matrix: Tensor = self.matrix.compute()
        return matrix[: len(self.label_names)]

    def reset(self) -> None:
        """Removes all clips from the metrics."""
        for metric in (self.matrix, self.calibration, self.nll, self.brier):
            metric.reset()
