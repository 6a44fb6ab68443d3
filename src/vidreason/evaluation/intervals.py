"""Intervals of scores, and differences between two methods: on other clips, and in other training runs.

Two questions have two answers. "Would this model do as well on other clips?" resamples groups of clips (clips of one
source are not independent). "Would another training run do as well?" needs several runs with different seeds, and
takes each seed's difference on the same clips as one observation: pooling the clips of all seeds would forget that
runs differ.

Shape letters: N clips, G groups, D draws, S seeds, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from vidreason.evaluation.decisions import UNDECIDED, Decisions, Floats
from vidreason.evaluation.scores import BELOW_ONE, BINS

DRAWS = 2000
"""Bootstrap draws."""
FEWEST_GROUPS = 20
"""Below this number of groups, an interval by resampling them would be too narrow and is withheld."""
_LEVEL = 0.05
_FLIPS = 10_000
_EXACT_GROUPS = 13  # 2**13 sign patterns are fewer than _FLIPS
_POWER = 0.8
_Z = float(stats.norm.ppf(0.975))
_CHUNK = 20_000_000  # numbers in one block of bootstrap weights


@dataclass(frozen=True)
class Difference:
    """The difference between two methods, by default in accuracy, first minus second, on the same clips."""

    mean: float
    low: float | None
    high: float | None
    """95 % interval over seeds (Student t); None for a single seed."""
    p_value: float | None
    """Two-sided p-value of the sign-flip test over groups; None for several seeds."""
    detectable: float
    """Smallest true difference that is found with probability 0.8 at the 5 % level, given the spread seen here."""
    seeds: int
    clips: int

    @property
    def margin(self) -> float:
        """Half-width of the 95 % interval: over seeds (Student t), or for a single seed over groups (normal)."""
        if self.low is not None:
            return self.mean - self.low
        return self.detectable * _Z / (_Z + float(stats.norm.ppf(_POWER)))

    @property
    def shown(self) -> bool:
        """True if it is not 0 at the 5 % level: by the interval over seeds, else the sign-flip test over groups."""
        if self.low is not None and self.high is not None:
            return self.low > 0 or self.high < 0
        return self.p_value is not None and self.p_value < _LEVEL


def bootstrap(decisions: Decisions, draws: int = DRAWS, seed: int = 0) -> dict[str, tuple[float, float]] | None:
    """Computes 95 % percentile intervals by drawing groups with replacement.

    Returns:
        Intervals of ``acc``, ``balanced_acc``, ``macro_f1`` and, where there are probabilities, ``nll``, ``brier`` and
        ``ece``; None for fewer than 20 groups.
    """
    _, group = np.unique(np.array(decisions.groups), return_inverse=True)
    groups = int(group.max()) + 1
    if groups < FEWEST_GROUPS:
        return None
    generator = np.random.default_rng(seed)
    size = max(1, _CHUNK // len(decisions))
    parts: list[dict[str, Floats]] = []
    for first in range(0, draws, size):
        times = generator.multinomial(groups, np.full(groups, 1 / groups), size=min(size, draws - first))
        parts.append(_weighted_scores(decisions, times[:, group].astype(np.float64)))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: _percentiles(values) for name, values in joined.items()}


def correctness(decisions: Decisions) -> Floats:
    """Returns 1 for a right decision and 0 for another one [N]."""
    return decisions.right.astype(np.float64)


def compare(
    first: Sequence[Decisions], second: Sequence[Decisions], value: Callable[[Decisions], Floats] = correctness
) -> Difference:
    """Compares two methods on the same clips.

    Args:
        first: [S] decisions of a method, one per seed.
        second: [S] decisions of the other method, in the same order of seeds.
        value: Returns what is compared [N], a number from 0 to 1 per clip; by default the accuracy.

    Raises:
        ValueError: If a seed has no clip that both methods decided about.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"need the same seeds of both methods, got {len(first)} and {len(second)}")
    pairs = [_paired(a, b, value) for a, b in zip(first, second, strict=True)]
    means = np.array([float(values.mean()) for values, _ in pairs])
    clips = len(pairs[0][0])
    if len(pairs) > 1:
        seeds = len(means)
        error = float(means.std(ddof=1)) / math.sqrt(seeds)
        t = float(stats.t.ppf(0.975, seeds - 1))
        needed = (t + float(stats.t.ppf(_POWER, seeds - 1))) * error
        mean = float(means.mean())
        return Difference(mean, mean - t * error, mean + t * error, None, needed, seeds, clips)
    values, groups = pairs[0]
    sums = _group_sums(values, groups)
    return Difference(float(means[0]), None, None, sign_flip(sums), detectable_difference(values, groups), 1, clips)


def sign_flip(sums: Floats, seed: int = 0) -> float:
    """Returns the two-sided p-value of the hypothesis that the sign of every group's difference is a coin flip.

    Args:
        sums: [G] sum of each group's differences.
        seed: Seed of the random sign patterns; with at most 13 groups all patterns are enumerated.
    """
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    seen = abs(float(sums.sum())) - 1e-9
    if len(sums) <= _EXACT_GROUPS:
        bits = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1
        return float((np.abs((2 * bits - 1) @ sums) >= seen).mean())
    generator = np.random.default_rng(seed)
    count = 0
    for _ in range(10):
        signs = generator.integers(0, 2, size=(_FLIPS // 10, len(sums))) * 2 - 1
        count += int((np.abs(signs @ sums) >= seen).sum())
    return (count + 1) / (_FLIPS + 1)  # the seen pattern is one of them


def detectable_difference(values: Floats, groups: Sequence[str]) -> float:
    """Returns the smallest true difference that this many clips would show with probability 0.8 at the 5 % level.

    Args:
        values: [N] differences seen, per clip between -1 and 1; two methods that agree everywhere count as if they
            disagreed about one clip, as the spread would be 0.
        groups: [N] group of each clip.
    """
    sums, n = _group_sums(values, groups), len(values)
    sizes = _group_sums(np.ones(n), groups)
    spread = float(((sums - values.mean() * sizes) ** 2).sum())
    error = math.sqrt(max(spread, 1.0)) / n
    return float((_Z + stats.norm.ppf(_POWER)) * error)


def over_seeds(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Returns the mean of a score over seeds and its 95 % Student-t interval; no interval for one seed."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return mean, None
    half = float(stats.t.ppf(0.975, len(array) - 1)) * float(array.std(ddof=1)) / math.sqrt(len(array))
    return mean, (mean - half, mean + half)


def _paired(
    first: Decisions, second: Decisions, value: Callable[[Decisions], Floats]
) -> tuple[Floats, tuple[str, ...]]:
    """Returns (difference [N] in ``value``, group [N]) of the clips that both decided about."""
    place = {name: row for row, name in enumerate(second.ids)}
    rows = [(row, place[name]) for row, name in enumerate(first.ids) if name in place]
    if not rows:
        raise ValueError("the two methods decided about different clips, so that they cannot be compared")
    a, b = (list(side) for side in zip(*rows, strict=True))
    return value(first)[a] - value(second)[b], tuple(first.groups[row] for row in a)


def _group_sums(values: Floats, groups: Sequence[str]) -> Floats:
    _, group = np.unique(np.array(groups), return_inverse=True)
    return np.bincount(group, weights=values).astype(np.float64)


def _percentiles(values: Floats) -> tuple[float, float]:
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def _weighted_scores(decisions: Decisions, weights: Floats) -> dict[str, Floats]:
    """Returns scores [D] of the clips, each counted ``weights`` [D, N] times."""
    classes, total = len(decisions.label_names), weights.sum(1)
    labels = np.eye(classes)[decisions.labels]
    chosen = np.eye(classes + 1)[np.where(decisions.pred == UNDECIDED, classes, decisions.pred)][:, :classes]
    right = decisions.right.astype(np.float64)
    labelled, decided, hits = weights @ labels, weights @ chosen, weights @ (labels * right[:, None])
    found = {"acc": weights @ right / total}
    with np.errstate(invalid="ignore", divide="ignore"):
        found["balanced_acc"] = np.nanmean(hits / labelled, axis=1)
        found["macro_f1"] = np.nanmean(2 * hits / (labelled + decided), axis=1)
    if decisions.probs is not None and decisions.confidence is not None:
        truth = decisions.probs[np.arange(len(decisions)), decisions.labels]
        found["nll"] = weights @ -np.log(np.clip(truth, 1e-12, None)) / total
        found["brier"] = weights @ ((decisions.probs - labels) ** 2).sum(1) / total
        found["ece"] = np.abs(weights @ (_bins(decisions.confidence) * (decisions.confidence - right)[:, None])).sum(1)
        found["ece"] /= total
    return found


def _bins(confidence: Floats) -> NDArray[np.float64]:
    """Returns the indicators [N, 15] of the bin of each confidence."""
    edges = np.linspace(0, 1, BINS + 1)
    index = np.searchsorted(edges, np.clip(confidence, 0.0, BELOW_ONE), side="right") - 1
    return np.eye(BINS)[index]
