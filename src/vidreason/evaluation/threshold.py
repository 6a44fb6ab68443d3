"""A confidence above which decisions are wrong at most as often as asked for, from split ``cal`` alone.

Candidates are tested from strict to loose, each by the one-sided 95 % Clopper–Pearson bound of its error, until one
fails; the last that passed is the threshold. Testing in an order that does not depend on the errors needs no correction
for the number of tests (fixed-sequence testing; Angelopoulos et al., Learn then Test, arXiv 2110.01052, section 3.2).
The order comes from confidences whose temperature was fitted on other groups of clips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats

from vidreason.evaluation.decisions import Decisions, Floats
from vidreason.lightning_modules.decisions.threshold import Threshold
from vidreason.lightning_modules.functional.calibration import fit_temperature

LEVEL = 0.05
"""Probability that a threshold is returned although its error is above the one asked for."""
FOLDS = 5


def needed(error: float) -> int:
    """Returns the smallest number of accepted clips whose bound can be below ``error``, with none of them wrong.

    >>> needed(0.10), needed(0.05)
    (29, 59)
    """
    return math.ceil(math.log(LEVEL) / math.log1p(-error))


def upper_bound(wrong: int, accepted: int) -> float:
    """Returns the one-sided 95 % Clopper–Pearson bound of an error rate."""
    return 1.0 if wrong >= accepted else float(stats.beta.ppf(1 - LEVEL, wrong + 1, accepted - wrong))


def fit_threshold(cal: Decisions, error: float, weights_sha: str = "", samples: int = 0, seed: int = 0) -> Threshold:
    """Finds the loosest threshold whose error is at most ``error``, with probability 0.95 over draws of ``cal``.

    Args:
        cal: Decisions about ``cal`` with unscaled probabilities.
        error: Largest share of wrong decisions among accepted ones.
        weights_sha: Hash of the weights, to recognise them.
        samples: Traces per clip.
        seed: Seed of the folds.

    Raises:
        ValueError: If no threshold can be shown to keep the error; the message says how many clips would be needed.
    """
    if not 0 < error < 1:
        raise ValueError(f"--error {error:g}: must be between 0 and 1")
    assert cal.probs is not None, "a method without probabilities has no threshold"
    confidence = cross_fitted_confidence(cal, seed)
    least, chosen = needed(error), None
    order = np.argsort(-confidence, kind="stable")
    seen: dict[str, bool] = {}
    tried: tuple[int, int] | None = None
    for place, row in enumerate(order):
        group = cal.groups[row]
        seen[group] = seen.get(group, False) or not bool(cal.right[row])
        last_of_tie = place + 1 == len(order) or confidence[order[place + 1]] < confidence[row]
        if len(seen) < least or not last_of_tie:
            continue
        tried = sum(seen.values()), len(seen)
        if upper_bound(*tried) > error:
            break
        chosen = (float(confidence[row]), tried, (place + 1) / len(order))
    if chosen is None:
        raise ValueError(_refusal(cal, confidence, error, least, tried))
    level, (wrong, accepted), coverage = chosen
    temperature = _temperature(cal, np.arange(len(cal)))
    return Threshold(
        level, temperature, error, upper_bound(wrong, accepted), accepted, wrong, coverage, weights_sha, samples
    )


def cross_fitted_confidence(cal: Decisions, seed: int = 0) -> Floats:
    """Returns the confidence [N] of each clip, scaled by a temperature that was fitted on the groups of other folds."""
    names = np.unique(np.array(cal.groups))
    fold_of = dict(zip(names, np.random.default_rng(seed).permutation(len(names)) % FOLDS, strict=True))
    fold = np.array([fold_of[group] for group in cal.groups])
    confidence = np.empty(len(cal))
    for number in range(FOLDS):
        own, others = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        if len(own):
            scaled = cal.take(own).scaled(_temperature(cal, others) if len(others) else 1.0)
            assert scaled.confidence is not None
            confidence[own] = scaled.confidence
    return confidence


def _temperature(cal: Decisions, rows: Sequence[int] | np.ndarray) -> float:
    own = cal.take(np.asarray(rows))
    assert own.probs is not None
    return fit_temperature(torch.from_numpy(own.probs).clamp(min=1e-30).log(), torch.from_numpy(own.labels)).temperature


def _refusal(cal: Decisions, confidence: Floats, error: float, least: int, tried: tuple[int, int] | None) -> str:
    """Returns why there is no threshold, and how many clips would be needed."""
    groups = len(set(cal.groups))
    unit = "clips" if groups == len(cal) else "groups of clips"
    if tried is None:
        return (
            f"no threshold for an error of {error:.0%}: cal has {groups} {unit}, and {least} accepted ones without an "
            f"error are the fewest that can show it; add at least {least - groups} {unit} to split cal"
        )
    wrong, accepted = tried
    rate = wrong / accepted
    message = (
        f"no threshold for an error of {error:.0%}: of the {accepted} surest {unit} of cal {wrong} are wrong, "
        f"so that the error may be {upper_bound(wrong, accepted):.1%}"
    )
    if rate >= error:
        return f"{message}, and more clips would not change that; ask for an error above {rate:.0%}"
    accepted_needed = next(n for n in range(accepted, 10**7) if upper_bound(math.ceil(rate * n), n) <= error)
    clips_needed = math.ceil(groups * accepted_needed / accepted)
    return (
        f"{message}; at this rate {accepted_needed} accepted {unit} would show it, and at this coverage split cal "
        f"would need about {clips_needed}"
    )
