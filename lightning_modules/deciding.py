"""How scores or sampled answers become a decision about a clip.

Shape letters: B clips, C classes, K samples per clip, R closed-set questions, N texts, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vidreason.datamodules.types import TextBatch, VideoBatch
from vidreason.lightning_modules.functional.reductions import (
    average_over_traces,
    label_log_probabilities,
    sequence_logprobs,
)
from vidreason.lightning_modules.metrics import UNDECIDED, ClassificationMetrics
from vidreason.lightning_modules.predictions import Decisions, TraceText
from vidreason.lightning_modules.rollout import Completion
from vidreason.rewards.completion import match_label

VOTE_SMOOTHING = 0.01
"""Pseudo-count of every class in the probabilities of generated answers; keeps their NLL finite."""


class ClosedSet(NamedTuple):
    """Scores of all classes, one row per question."""

    scores: Tensor
    """[R, C] log-likelihood of each class name, end of turn included"""
    owner: Tensor
    """[R] int64, index of the clip"""


def closed_set(logprobs: Tensor, texts: TextBatch, n_classes: int) -> ClosedSet:
    """Reads the sequence log-likelihood of every class name out of the scores of a batch.

    The rows of ``texts`` that count (``loss_mask`` somewhere True) are the class names: behind each question C of them,
    in the order of ``label_names``.

    Args:
        logprobs: [N, L].
        texts: N texts.
        n_classes: C.

    Raises:
        ValueError: The rows that count are no multiple of C, or C rows in a row belong to different clips.
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
    """Log of the class probabilities of every clip, averaged over its closed-set questions, [B, C].

    Args:
        logprobs: [N, L].
        texts: N texts, as ``closed_set`` takes them.
        n_classes: C.
        n_clips: B.
    """
    asked = closed_set(logprobs, texts, n_classes)
    return average_over_traces(label_log_probabilities(asked.scores), asked.owner, n_clips)


def decide_by_probs(
    probs: Tensor,
    label_names: Sequence[str],
    traces: Sequence[tuple[TraceText, ...]] = (),
    unscaled: Tensor | None = None,
) -> Decisions:
    """Chooses the likeliest class of every clip.

    Args:
        probs: [B, C].
        label_names: C classes.
        traces: [B][K] what the probabilities rest on, or nothing.
        unscaled: [B, C] before temperature scaling, or None.
    """
    chosen = probs.argmax(dim=1)
    return Decisions(
        probs=probs.float().cpu(),
        pred=chosen.cpu(),
        answers=tuple(label_names[i] for i in chosen.tolist()),
        traces=tuple(traces) or ((),) * len(probs),
        unscaled=None if unscaled is None else unscaled.float().cpu(),
    )


def decide_by_answers(groups: Sequence[Sequence[Completion]], label_names: Sequence[str]) -> Decisions:
    """Lets the K sampled answers of every clip vote.

    Args:
        groups: [B][K] completions.
        label_names: C classes.
    """
    votes = [vote([match_label(c.parsed.answer, label_names) for c in group], label_names) for group in groups]
    return Decisions(
        probs=torch.stack([v.probs for v in votes]),
        pred=torch.tensor([v.chosen for v in votes]),
        answers=tuple(group[0].parsed.answer for group in groups),
        traces=tuple(tuple(TraceText(c.text, c.parsed.answer) for c in group) for group in groups),
    )


class Vote(NamedTuple):
    """Outcome of one clip's samples."""

    probs: Tensor
    """[C] fp32"""
    chosen: int
    """-1 where no sample named a class"""


def vote(answers: Sequence[str | None], label_names: Sequence[str]) -> Vote:
    """Turns the answers of one clip's samples into class probabilities and a choice.

    An answer that names no class spreads its vote evenly; a tie goes to the class that was named first.

    Args:
        answers: The class named by each of K >= 1 samples, None where none was.
        label_names: C classes.

    Example:
        >>> vote(["b", None, "b"], ["a", "b"]).chosen
        1
        >>> vote([None], ["a", "b"]).probs.tolist()
        [0.5, 0.5]
    """
    classes = len(label_names)
    named = [label_names.index(answer) for answer in answers if answer is not None]
    counts = torch.full((classes,), (len(answers) - len(named)) / classes + VOTE_SMOOTHING)
    counts += torch.bincount(torch.tensor(named, dtype=torch.int64), minlength=classes)
    return Vote(counts / counts.sum(), max(named, key=named.count) if named else -1)


def update_metrics(
    metrics: ClassificationMetrics,
    batch: VideoBatch,
    decisions: Decisions | None,
    label_names: Sequence[str],
    device: torch.device,
) -> None:
    """Adds the labelled clips of a batch to ``metrics``; an unreadable one is undecided, so counts as wrong.

    Args:
        metrics: Of the batch's split, on ``device``.
        batch: B readable clips and F that are not.
        decisions: About the readable ones; None where there are none.
        label_names: C classes.
        device: Where the metrics are.
    """
    classes = len(label_names)
    lost = [label_names.index(f.clip.label) for f in batch.failed if f.clip.label is not None]
    probs = torch.full((len(lost), classes), 1 / classes)
    labels = torch.tensor(lost, dtype=torch.int64)
    pred = torch.full((len(lost),), UNDECIDED)
    if decisions is not None:
        labelled = batch.labels.cpu() >= 0
        probs = torch.cat([decisions.probs[labelled], probs])
        labels = torch.cat([batch.labels.cpu()[labelled], labels])
        pred = torch.cat([decisions.pred[labelled], pred])
    metrics.update(probs.to(device), labels.to(device), pred.to(device))
