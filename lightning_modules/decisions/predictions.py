"""Decisions about clips, and the lines of ``predictions.jsonl``.

Shape letters: B clips, C classes, K samples per clip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from vidreason.datamodules.types import Clip, FailedClip


@dataclass(frozen=True)
class Trace:
    """A completion that a decision is based on."""

    text: str
    answer: str | None


@dataclass(frozen=True)
class Prediction:
    """One line of ``predictions.jsonl``; the fields are named as in the file."""

    video_id: str
    split: str
    group: str
    label: str | None
    pred: str | None
    """Chosen class; None if no answer could be parsed or the clip could not be read, which counts as wrong."""
    probs: Mapping[str, float]
    answer: str | None
    unparsed: bool
    failed: bool
    traces: tuple[Trace, ...] = ()


@dataclass(frozen=True)
class BatchDecisions:
    """Decisions about B clips."""

    probs: Tensor
    """[B, C] fp32, rows sum to 1."""
    pred: Tensor
    """[B] int64, -1 if no answer could be parsed."""
    answers: tuple[str | None, ...]
    """[B]"""
    traces: tuple[tuple[Trace, ...], ...]
    """[B][K], K may be 0."""
    unscaled: Tensor | None = None
    """[B, C] fp32 before temperature scaling; None if ``probs`` are not scaled."""

    def prediction(self, row: int, clip: Clip, split: str, label_names: Sequence[str]) -> Prediction:
        """Returns the prediction about clip ``row`` of the batch."""
        pred = int(self.pred[row])
        return Prediction(
            video_id=clip.video_id,
            split=split,
            group=clip.group,
            label=clip.label,
            pred=label_names[pred] if pred >= 0 else None,
            probs=dict(zip(label_names, self.probs[row].tolist(), strict=True)),
            answer=self.answers[row],
            unparsed=pred < 0,
            failed=False,
            traces=self.traces[row],
        )


def failed_prediction(failed: FailedClip, split: str, label_names: Sequence[str]) -> Prediction:
    """Returns the prediction about an unreadable clip, with uniform probabilities and no chosen class."""
    clip = failed.clip
    probs = dict.fromkeys(label_names, 1 / len(label_names))
    return Prediction(clip.video_id, split, clip.group, clip.label, None, probs, None, unparsed=False, failed=True)
