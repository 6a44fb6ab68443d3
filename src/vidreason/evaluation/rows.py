"""Rows of an evaluation: the scores of one method on one split, before and after temperature scaling."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vidreason.datamodules.split_names import CALIBRATION_SPLIT
from vidreason.evaluation.decisions import Decisions
from vidreason.evaluation.intervals import bootstrap
from vidreason.evaluation.plan import Method
from vidreason.evaluation.scores import per_class, scores
from vidreason.lightning_modules.decisions.predictions import Prediction, read_predictions
from vidreason.lightning_modules.functional.calibration import fit_temperature
from vidreason.lightning_modules.weights.reviewer_info import CalibratorInfo

FEWEST_IN_GROUP = 5
"""Groups of fewer clips have no row of their own."""


@dataclass(frozen=True)
class Who:
    """The method of a row, and the run that it belongs to."""

    run: str
    pipeline: str
    seed: int
    method: str
    mode: str
    probe_of: str | None
    """The method that a probe belongs to."""


@dataclass(frozen=True)
class Cost:
    """The mean cost of one decision."""

    tokens_per_clip: float | None
    """Sampled tokens."""
    seconds_per_clip: float | None
    """Wall time of the whole test stage, loading included, divided by its clips."""


@dataclass(frozen=True)
class EvaluationRow:
    """The scores of one method on one split, or on one group of it, in ``evaluation.json``."""

    who: Who
    split: str
    group: str | None
    """None for the whole split."""
    clips: int
    groups: int
    scores: Mapping[str, float | None]
    """Scores of the probabilities as the model gives them."""
    intervals: Mapping[str, tuple[float, float]] | None
    """95 % intervals over groups ("other clips, this model"); None below 20 groups."""
    temperature: float | None
    """Fitted on split ``cal``; None without such a split, or without probabilities."""
    scaled: Mapping[str, float | None] | None
    """Scores of the temperature-scaled probabilities."""
    classes: Mapping[str, Mapping[str, float | int | None]]
    """Precision, recall and F1 by class."""
    cost: Cost

    @property
    def name(self) -> str:
        """``pipeline: method``, as comparisons name it."""
        return f"{self.who.pipeline}: {self.who.method}"

    @property
    def confidence(self) -> float | None:
        """Mean confidence, temperature-scaled if there is a temperature."""
        return (self.scaled or self.scores).get("confidence")


@dataclass(frozen=True)
class Evaluated:
    """One method of a run: its decisions by split, and its temperature."""

    method: Method
    decisions: Mapping[str, Decisions]
    """By split, with the probabilities as the model gives them."""
    temperature: float | None
    seconds_per_clip: float | None

    def scaled(self, split: str) -> Decisions:
        """Returns the decisions about a split, with the temperature if there is one."""
        own = self.decisions[split]
        return own if self.temperature is None or own.probs is None else own.scaled(self.temperature)

    @classmethod
    def of(cls, method: Method, decisions: Mapping[str, Decisions]) -> Evaluated:
        """Returns a method that takes no time, with its temperature from split ``cal``."""
        return cls(method, decisions, _temperature(decisions), None)

    @classmethod
    def read(
        cls,
        method: Method,
        file: Path,
        label_names: Sequence[str],
        seconds: float | None,
        temperature: float | None = None,
    ) -> Evaluated:
        """Reads the predictions of a method and fits its temperature on split ``cal``.

        Args:
            method: The method.
            file: The ``predictions.jsonl`` of its test stage.
            label_names: The C class names.
            seconds: Wall time of the test stage; None if it is not known.
            temperature: The temperature of the method that a probe belongs to.
        """
        by_split: dict[str, list[Prediction]] = defaultdict(list)
        for prediction in read_predictions(file):
            by_split[prediction.split].append(prediction)
        decisions = {split: _decisions(method, found, label_names) for split, found in by_split.items()}
        clips = sum(map(len, decisions.values()))
        found = _temperature(decisions) if method.probe_of is None else temperature
        return cls(method, decisions, found, seconds / clips if seconds and clips else None)


def rows_of(evaluated: Evaluated, run: Path, pipeline: str, seed: int, by_group: bool) -> list[EvaluationRow]:
    """Returns the rows of one method: one per split except ``cal``, and per group of at least 5 clips if asked for."""
    rows, method = [], evaluated.method
    for split, decisions in evaluated.decisions.items():
        if split == CALIBRATION_SPLIT:
            continue
        parts: dict[str | None, list[int]] = {None: list(range(len(decisions)))}
        if by_group:
            members: dict[str, list[int]] = defaultdict(list)
            for place, name in enumerate(decisions.groups):
                members[name].append(place)
            parts |= {name: found for name, found in members.items() if len(found) >= FEWEST_IN_GROUP}
        for group, places in parts.items():
            own = decisions.take(places)
            scaled = None if evaluated.temperature is None else own.scaled(evaluated.temperature)
            rows.append(
                EvaluationRow(
                    who=Who(str(run), pipeline, seed, method.name, method.mode, method.probe_of),
                    split=split,
                    group=group,
                    clips=len(own),
                    groups=len(set(own.groups)),
                    scores=scores(own),
                    intervals=bootstrap(own),
                    temperature=evaluated.temperature,
                    scaled=None if scaled is None else scores(scaled),
                    classes=per_class(own),
                    cost=Cost(own.tokens, evaluated.seconds_per_clip),
                )
            )
    return rows


def _decisions(method: Method, predictions: Sequence[Prediction], label_names: Sequence[str]) -> Decisions:
    if method.mode in ("answer", "vote"):
        return Decisions.vote(predictions, label_names, method.samples)
    found = Decisions.read(predictions, label_names)
    if method.calibrator is None:
        return found
    # The stage has scaled its probabilities already; the temperature is undone, so that all methods are fitted alike.
    return found.scaled(1 / CalibratorInfo.read(Path(method.calibrator), "calibration").temperature)


def _temperature(decisions: Mapping[str, Decisions]) -> float | None:
    own = decisions.get(CALIBRATION_SPLIT)
    if own is None or own.probs is None:
        return None
    logprobs = torch.from_numpy(own.probs).clamp(min=1e-30).log()
    return fit_temperature(logprobs, torch.from_numpy(own.labels)).temperature
