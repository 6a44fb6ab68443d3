"""Rows of ``evaluation.json``, as the report reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidreason.evaluation.rows import Cost, EvaluationRow, Who


@dataclass(frozen=True)
class EvaluationFile:
    """The contents of ``evaluation.json``."""

    rows: tuple[EvaluationRow, ...]
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


def _row(content: Mapping[str, Any]) -> EvaluationRow:
    nested = {"who": Who(**content["who"]), "cost": Cost(**content["cost"])}
    return EvaluationRow(**{**content, **nested})
