"""Decisions of one method about the clips of one split, as arrays.

Shape letters: N clips, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from vidreason.lightning_modules.decisions.deciders import vote
from vidreason.lightning_modules.decisions.predictions import Prediction, Trace
from vidreason.lightning_modules.functional.calibration import apply_temperature
from vidreason.rewards.completion import match_label

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
UNDECIDED = -1
"""Value of ``pred`` for a clip without a decision, which counts as wrong."""


@dataclass(frozen=True)
class Decisions:
    """Decisions of one method about the N labelled clips of one split."""

    ids: tuple[str, ...]
    """[N] video ids."""
    groups: tuple[str, ...]
    """[N] group of each clip; a clip without a group is a group of its own."""
    label_names: tuple[str, ...]
    """[C]"""
    labels: Ints
    """[N] 0 … C-1."""
    pred: Ints
    """[N] 0 … C-1, or ``UNDECIDED``."""
    probs: Floats | None
    """[N, C], rows sum to 1 and are uniform for an unreadable clip; None if the method gives no probabilities."""
    confidence: Floats | None
    """[N] Probability of the decision, or its share of a vote; None if the method gives neither."""
    tokens: float | None
    """Mean number of sampled tokens per clip; None if it is not known."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def right(self) -> NDArray[np.bool_]:
        """[N] whether the decision is the label."""
        found: NDArray[np.bool_] = self.pred == self.labels
        return found

    @classmethod
    def read(cls, predictions: Sequence[Prediction], label_names: Sequence[str]) -> Decisions:
        """Reads the predictions of a test stage.

        Args:
            predictions: Predictions about labelled clips of one split.
            label_names: The C class names.
        """
        names = tuple(label_names)
        uniform = dict.fromkeys(names, 1 / len(names))
        known = any(p.probs and not p.failed for p in predictions)
        probs = np.array([[(p.probs or uniform)[name] for name in names] for p in predictions]) if known else None
        pred = [names.index(p.pred) if p.pred is not None else UNDECIDED for p in predictions]
        sampled = _mean_tokens([p.traces for p in predictions])
        return cls._of(predictions, names, pred, probs, None if probs is None else _chosen(probs, pred), sampled)

    @classmethod
    def vote(cls, predictions: Sequence[Prediction], label_names: Sequence[str], samples: int) -> Decisions:
        """Decides by the most frequent answer of the first ``samples`` traces of each clip.

        A tie goes to the class that was named first. The share of the vote is a confidence and no probability.
        """
        names = tuple(label_names)
        pred, share = [], []
        for p in predictions:
            answers = [match_label(trace.answer, names) for trace in p.traces[:samples]]
            chosen = vote(answers, names).chosen if answers else UNDECIDED
            pred.append(chosen)
            share.append(0.0 if chosen == UNDECIDED else answers.count(names[chosen]) / samples)
        sampled = _mean_tokens([p.traces[:samples] for p in predictions])
        confidence = np.array(share) if samples > 1 else None
        return cls._of(predictions, names, pred, None, confidence, sampled)

    @classmethod
    def _of(
        cls,
        predictions: Sequence[Prediction],
        names: tuple[str, ...],
        pred: Sequence[int],
        probs: Floats | None,
        confidence: Floats | None,
        tokens: float | None,
    ) -> Decisions:
        return cls(
            ids=tuple(p.video_id for p in predictions),
            groups=tuple(p.group or p.video_id for p in predictions),
            label_names=names,
            labels=np.array([names.index(str(p.label)) for p in predictions], dtype=np.int64),
            pred=np.array(pred, dtype=np.int64),
            probs=probs,
            confidence=confidence,
            tokens=tokens,
        )

    def scaled(self, temperature: float) -> Decisions:
        """Returns the decisions with probabilities ``softmax(log p / temperature)``."""
        assert self.probs is not None, "a method without probabilities has no temperature"
        logits = torch.from_numpy(self.probs).clamp(min=1e-30).log()
        probs = apply_temperature(logits, temperature).numpy()
        return replace(self, probs=probs, confidence=_chosen(probs, self.pred))

    def take(self, rows: Sequence[int] | Ints) -> Decisions:
        """Returns the decisions about the clips ``rows``."""
        index = np.asarray(rows, dtype=np.int64)
        return replace(
            self,
            ids=tuple(self.ids[i] for i in index),
            groups=tuple(self.groups[i] for i in index),
            labels=self.labels[index],
            pred=self.pred[index],
            probs=None if self.probs is None else self.probs[index],
            confidence=None if self.confidence is None else self.confidence[index],
        )


def _mean_tokens(traces: Sequence[Sequence[Trace]]) -> float | None:
    """Returns the mean number of sampled tokens per clip; None if a trace does not say its number."""
    counts = [trace.n_tokens for group in traces for trace in group]
    return None if any(n is None for n in counts) else sum(filter(None, counts)) / max(len(traces), 1)


def _chosen(probs: Floats, pred: Sequence[int] | Ints) -> Floats:
    """Returns the probability [N] of each decision; of an undecided clip, the largest."""
    index = np.asarray(pred, dtype=np.int64)
    chosen = probs[np.arange(len(probs)), np.clip(index, 0, None)]
    return np.where(index == UNDECIDED, probs.max(axis=1), chosen)
