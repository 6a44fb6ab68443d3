"""Rows of ``evaluation.json``, as the report reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """The scores of one method of one run on one split, or on one group of it."""

    pipeline: str
    seed: int
    method: str
    probe_of: str | None
    """The method that a probe belongs to."""
    split: str
    group: str | None
    """None for the whole split."""
    clips: int
    groups: int
    scores: Mapping[str, float | None]
    intervals: Mapping[str, Sequence[float]] | None
    """95 % intervals over groups; None below 20 groups."""
    temperature: float | None
    """Fitted on split ``cal``; None without such a split, or without probabilities."""
    scaled: Mapping[str, float | None] | None
    """Scores of the temperature-scaled probabilities."""
    tokens_per_clip: float | None
    seconds_per_clip: float | None

    @property
    def name(self) -> str:
        """``pipeline: method``, as comparisons name it."""
        return f"{self.pipeline}: {self.method}"

    @property
    def confidence(self) -> float | None:
        """Mean confidence, temperature-scaled if there is a temperature."""
        return (self.scaled or self.scores).get("confidence")


@dataclass(frozen=True)
class EvaluationFile:
    """The contents of ``evaluation.json``."""

    rows: tuple[Row, ...]
    label_names: tuple[str, ...]
    """[C]"""


def read_evaluation(path: Path) -> EvaluationFile:
    """Reads ``evaluation.json``.

    Raises:
        ValueError: If the file is damaged, has no row, or was written by another release.
    """
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return EvaluationFile(tuple(map(_row, listed)), tuple(listed[0]["classes"]))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path}: not an evaluation ({error!r}); run vidreason evaluate again") from error


def _row(content: Mapping[str, Any]) -> Row:
    flat = {**content, **content["who"], **content["cost"]}
    return Row(**{name: flat[name] for name in Row.__dataclass_fields__})
