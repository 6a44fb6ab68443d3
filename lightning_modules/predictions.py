"""Decisions about clips, and the line that is written about each.

Shape letters: B clips, C classes, K samples per clip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from vidreason.datamodules.types import Clip, FailedClip


@dataclass(frozen=True)
class TraceText:
    """A completion that led to a decision, as it is written to ``predictions.jsonl``."""

    text: str
    answer: str | None


@dataclass(frozen=True)
class Prediction:
    """One line of ``predictions.jsonl``; field names are those of the file."""

    video_id: str
    split: str
    group: str
    label: str | None
    pred: str | None
    """None where nothing could be parsed or the clip could not be read: counted wrong"""
    probs: Mapping[str, float]
    answer: str | None
    unparsed: bool
    failed: bool
    traces: tuple[TraceText, ...] = ()


@dataclass(frozen=True)
class Decisions:
    """What a stage decided about B clips."""

    probs: Tensor
    """[B, C] fp32, rows sum to 1"""
    pred: Tensor
    """[B] int64, -1 where no answer could be parsed"""
    answers: tuple[str | None, ...]
    """[B]"""
    traces: tuple[tuple[TraceText, ...], ...]
    """[B][K], K may be 0"""
    unscaled: Tensor | None = None
    """[B, C] fp32 before temperature scaling, where ``probs`` are scaled"""


def decided(clip: Clip, split: str, row: int, decisions: Decisions, label_names: Sequence[str]) -> Prediction:
    """Returns the prediction line of clip ``row`` of a batch."""
    pred = int(decisions.pred[row])
    return Prediction(
        video_id=clip.video_id,
        split=split,
        group=clip.group,
        label=clip.label,
        pred=label_names[pred] if pred >= 0 else None,
        probs=dict(zip(label_names, decisions.probs[row].tolist(), strict=True)),
        answer=decisions.answers[row],
        unparsed=pred < 0,
        failed=False,
        traces=decisions.traces[row],
    )


def undecided(failed: FailedClip, split: str, label_names: Sequence[str]) -> Prediction:
    """Returns the prediction line of a clip that could not be read: no choice, uniform probabilities, counted wrong."""
    clip = failed.clip
    probs = dict.fromkeys(label_names, 1 / len(label_names))
    return Prediction(clip.video_id, split, clip.group, clip.label, None, probs, None, unparsed=False, failed=True)
