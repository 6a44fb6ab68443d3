"""Computes probabilities of a closed set of class names from the scores of texts.

Shape letters: B clips, C classes, R closed-set questions, N texts, L tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vidreason.datamodules.types import TextBatch
from vidreason.lightning_modules.functional.reductions import (
    average_over_traces,
    label_log_probabilities,
    sequence_logprobs,
)


class ClosedSet(NamedTuple):
    """Scores of all classes with one row per closed-set question."""

    scores: Tensor
    """[R, C] log-likelihood of each class name, including the end of turn."""
    owner: Tensor
    """[R] int64, index of each question's clip."""


def closed_set(logprobs: Tensor, texts: TextBatch, n_classes: int) -> ClosedSet:
    """Returns the sequence log-likelihood of every class name from the scores of a batch.

    The rows of ``texts`` with a True in ``loss_mask`` are the class names: C of them behind each question, in the order
    of ``label_names``.

    Args:
        logprobs: [N, L].
        texts: N texts.
        n_classes: Number of classes, C.

    Raises:
        ValueError: If the rows that count are not a multiple of C, or the C rows of a question have several clips.
    """
    rows = texts.loss_mask.any(dim=1)
    scores = sequence_logprobs(logprobs, texts.loss_mask)[rows]
    if scores.numel() % n_classes:
        raise ValueError(f"{scores.numel()} scored texts cannot be read as questions of {n_classes} classes each")
    owner = texts.owner[rows].view(-1, n_classes)
    if bool((owner != owner[:, :1]).any()):
        raise ValueError("the class names behind one question belong to different clips")
    return ClosedSet(scores.view(-1, n_classes), owner[:, 0])


def class_logprobs(logprobs: Tensor, texts: TextBatch, n_classes: int, n_clips: int) -> Tensor:
    """Returns the logarithms [B, C] of each clip's class probabilities, averaged over its closed-set questions.

    Args:
        logprobs: [N, L].
        texts: N texts; the rows that count are C class names behind each question.
        n_classes: Number of classes, C.
        n_clips: Number of clips, B.
    """
    asked = closed_set(logprobs, texts, n_classes)
    return average_over_traces(label_log_probabilities(asked.scores), asked.owner, n_clips)
