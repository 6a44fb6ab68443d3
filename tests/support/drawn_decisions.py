"""Random decisions whose probabilities carry information about the labels."""

from __future__ import annotations

import numpy as np

from vidreason.evaluation.decisions import UNDECIDED, Decisions

NAMES = ("fall", "sit", "walk")


def drawn(n: int, classes: int = 3, seed: int = 0, undecided: int = 0) -> Decisions:
    """Returns random decisions about n clips, each a group of its own; the first ``undecided`` have none."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, n)
    logits = generator.normal(size=(n, classes)) * 2 + 1.5 * np.eye(classes)[labels]
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    pred = probs.argmax(1)
    pred[:undecided] = UNDECIDED
    ids = tuple(f"clip{i}" for i in range(n))
    return Decisions(ids, ids, NAMES[:classes], labels, pred, probs, probs.max(1), None)
