"""Decisions about clips, and the lines of ``predictions.jsonl``.

Shape letters: B clips, C classes, K samples per clip.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # A pipeline reads predictions without the seconds that importing torch takes.
    from torch import Tensor

    from vidreason.datamodules.types import Clip, FailedClip


@dataclass(frozen=True)
class Trace:
    """A completion that a decision is based on."""

    text: str
    answer: str | None
    n_tokens: int | None = None
    """Number of sampled tokens; None if it is not known."""


@dataclass(frozen=True)
class Prediction:
    """The prediction about one clip; the fields are named as in ``predictions.jsonl``."""

    video_id: str
    split: str
    group: str
    label: str | None
    pred: str | None
    """Chosen class; None if no answer could be parsed or the clip could not be read, which counts as wrong."""
    probs: Mapping[str, float]
    """Class to probability; empty if the method gives none."""
    answer: str | None
    unparsed: bool
    failed: bool
    traces: tuple[Trace, ...] = ()

    @property
    def right(self) -> bool:
        """True if the clip was read and its label predicted."""
        return self.pred == self.label and not self.failed

    def line(self) -> str:
        """Returns the line of ``predictions.jsonl``, with its end."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class BatchDecisions:
    """Decisions about B clips."""

    probs: Tensor
    """[B, C] fp32, rows sum to 1; without meaning if ``has_probs`` is False."""
    pred: Tensor
    """[B] int64, -1 if no answer could be parsed."""
    answers: tuple[str | None, ...]
    """[B]"""
    traces: tuple[tuple[Trace, ...], ...]
    """[B][K], K may be 0."""
    unscaled: Tensor | None = None
    """[B, C] fp32 before temperature scaling; None if ``probs`` are not scaled."""
    has_probs: bool = True
    """False for single or greedy answers: how often the model would give them is not known."""

    def probabilities(self, row: int, label_names: Sequence[str]) -> dict[str, float]:
        """Returns class to probability of clip ``row`` of the batch; empty if there is none."""
        return dict(zip(label_names, self.probs[row].tolist(), strict=True)) if self.has_probs else {}

    @classmethod
    def joined(cls, parts: Sequence[BatchDecisions]) -> BatchDecisions:
        """Returns the decisions of several batches, at least one, as those of one batch."""
        import torch

        unscaled = [part.unscaled for part in parts if part.unscaled is not None]
        return cls(
            probs=torch.cat([part.probs for part in parts]),
            pred=torch.cat([part.pred for part in parts]),
            answers=tuple(answer for part in parts for answer in part.answers),
            traces=tuple(traces for part in parts for traces in part.traces),
            unscaled=torch.cat(unscaled) if unscaled else None,
            has_probs=all(part.has_probs for part in parts),
        )

    def prediction(self, row: int, clip: Clip, split: str, label_names: Sequence[str]) -> Prediction:
        """Returns the prediction about clip ``row`` of the batch."""
        pred = int(self.pred[row])
        return Prediction(
            video_id=clip.video_id,
            split=split,
            group=clip.group,
            label=clip.label,
            pred=label_names[pred] if pred >= 0 else None,
            probs=self.probabilities(row, label_names),
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


def read_predictions(path: Path) -> list[Prediction]:
    """Reads ``predictions.jsonl``; clips without a label are left out.

    Raises:
        ValueError: If a line is damaged or lacks a key; the message names file and line.
    """
    predictions = []
    # not splitlines(): texts are not ASCII-escaped and may contain U+2028
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            traces = tuple(
                Trace(trace["text"], trace["answer"], trace.get("n_tokens")) for trace in row["traces"] or ()
            )
            names = ("video_id", "split", "group", "label", "pred", "answer", "unparsed", "failed")
            fields = {name: row[name] for name in names}
            predictions.append(Prediction(**fields, probs=row["probs"] or {}, traces=traces))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: not a prediction ({error!r}); run its test stage again"
            ) from error
    return [p for p in predictions if p.label is not None]
