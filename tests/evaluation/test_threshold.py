"""Thresholds: numbers by hand, and the error that they promise by simulation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from vidreason.evaluation.decisions import Decisions
from vidreason.evaluation.threshold import cross_fitted_confidence, fit_threshold, needed, upper_bound
from vidreason.lightning_modules.decisions.threshold import Threshold


def cal(confidence: np.ndarray, right: np.ndarray, groups: list[str] | None = None) -> Decisions:
    """Returns decisions for class 0 of two with these confidences; the label is 0 where ``right`` is 1."""
    ids = tuple(f"c{i}" for i in range(len(confidence)))
    probs = np.stack([confidence, 1 - confidence], axis=1)
    zeros = np.zeros(len(ids), dtype=np.int64)
    return Decisions(ids, tuple(groups or ids), ("a", "b"), 1 - right.astype(np.int64), zeros, probs, confidence, None)


def drawn(generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns overconfident decisions: of those at confidence c, a share 0.2 + 0.79 c is right."""
    confidence = 0.5 + 0.5 * generator.random(n) ** 0.5
    return confidence, (generator.random(n) < 0.2 + 0.79 * confidence).astype(float)


def test_fewest_clips_and_bound_by_hand() -> None:
    assert (needed(0.10), needed(0.05)) == (29, 59)
    assert 0.9**29 <= 0.05 < 0.9**28
    # The bound with no error is where (1 - e)^n = 0.05; with errors, where the binomial tail is 0.05.
    assert upper_bound(0, 29) == pytest.approx(1 - 0.05 ** (1 / 29))
    assert stats.binom.cdf(3, 80, upper_bound(3, 80)) == pytest.approx(0.05)


def test_candidates_are_accepted_from_strict_to_loose_until_one_fails() -> None:
    confidence = np.linspace(0.99, 0.6, 60)
    right = np.ones(60)
    right[[45, 50, 51, 52]] = 0
    found = fit_threshold(cal(confidence, right), 0.10)
    order = np.argsort(-cross_fitted_confidence(cal(confidence, right)), kind="stable")
    wrong = np.cumsum(1 - right[order])
    passed = [k for k in range(29, 61) if upper_bound(int(wrong[k - 1]), k) <= 0.10]
    last = next(k for k in range(29, 61) if k + 1 not in passed)
    assert (found.accepted, found.wrong) == (last, int(wrong[last - 1]))
    assert found.coverage == pytest.approx(last / 60)
    assert found.bound == pytest.approx(upper_bound(found.wrong, found.accepted))
    assert found.bound <= 0.10


def test_the_error_is_kept_in_95_of_100_draws() -> None:
    """Simulates: the error on all clips of the world is above the one asked for in at most 5 % of the draws."""
    generator = np.random.default_rng(0)
    world_confidence, world_right = drawn(generator, 40_000)
    world = cal(world_confidence, world_right)
    broken = naive_broken = found = 0
    trials = 40
    for _ in range(trials):
        rows = generator.integers(0, len(world), 200)
        own = replace(world.take(rows), groups=tuple(map(str, range(200))))
        assert own.confidence is not None
        # The loosest cut whose error on the same clips is at most 10 %, as one would choose it by eye.
        order = np.argsort(-own.confidence)
        risk = np.cumsum(1 - own.right[order]) / np.arange(1, 201)
        cut = own.confidence[order][np.flatnonzero(risk <= 0.10).max(initial=0)]
        naive_broken += 1 - world_right[world_confidence >= cut].mean() > 0.10
        try:
            threshold = fit_threshold(own, 0.10)
        except ValueError:
            continue
        found += 1
        scaled = world.scaled(threshold.temperature)
        assert scaled.confidence is not None
        broken += 1 - world_right[scaled.confidence >= threshold.confidence].mean() > 0.10
    assert found > 10
    assert broken / trials <= 0.05
    assert naive_broken / trials > 0.3


def test_a_group_counts_once_and_is_wrong_if_one_of_its_clips_is() -> None:
    confidence, right = np.linspace(0.99, 0.5, 160), np.ones(160)
    right[[91, 101, 109, 121, 131, 141, 151]] = 0
    twins = [f"g{i // 2}" for i in range(160)]
    found = fit_threshold(cal(confidence, right, twins), 0.10)
    order = np.argsort(-cross_fitted_confidence(cal(confidence, right, twins)), kind="stable")
    accepted = [{twins[i] for i in order[:k]} for k in range(161)]
    wrong = [{twins[i] for i in order[:k] if not right[i]} for k in range(161)]
    first = next(k for k in range(161) if len(accepted[k]) == 29)
    failed = next(k for k in range(first, 161) if upper_bound(len(wrong[k]), len(accepted[k])) > 0.10)
    assert (found.accepted, found.wrong) == (len(accepted[failed - 1]), len(wrong[failed - 1]))
    assert found.coverage == pytest.approx((failed - 1) / 160)
    with pytest.raises(ValueError, match="20 groups of clips, and 29 accepted ones .* add at least 9 groups of clips"):
        fit_threshold(cal(confidence, right, [f"g{i // 8}" for i in range(160)]), 0.10)


def test_what_would_be_needed_is_named() -> None:
    confidence, right = np.linspace(0.99, 0.6, 64), np.ones(64)
    right[5] = 0  # 1 of the 59 surest is wrong; at that rate, rounded up, 3 of 153
    assert stats.binom.cdf(3, 153, 0.05) <= 0.05 < stats.binom.cdf(3, 152, 0.05)
    needs = r"of the 59 surest clips of cal 1 are wrong.*153 accepted clips .* split cal would need about 166$"
    with pytest.raises(ValueError, match=needs):
        fit_threshold(cal(confidence, right), 0.05)
    confidence, right = np.linspace(0.99, 0.6, 100), np.ones(100)
    right[:5] = 0
    with pytest.raises(ValueError, match=r"more clips would not change that; ask for an error above 17%"):
        fit_threshold(cal(confidence, right), 0.10)


def test_a_file_is_read_again_and_decides(tmp_path: Path) -> None:
    threshold = Threshold(0.8, 2.0, 0.1, 0.09, 40, 1, 0.5, "sha", 4)
    threshold.save(tmp_path)
    assert Threshold.load(tmp_path) == threshold
    assert Threshold.load(tmp_path / "elsewhere") is None
    # At temperature 2, odds of 16 become 4, a confidence of 0.8.
    assert threshold.accepts(torch.tensor([16 / 17 + 1e-6, 1 / 17 - 1e-6]))
    assert not threshold.accepts(torch.tensor([0.94, 0.06]))
    (tmp_path / "threshold.json").write_text('{"confidence": 1}')
    with pytest.raises(ValueError, match="threshold.json: not a threshold"):
        Threshold.load(tmp_path)
