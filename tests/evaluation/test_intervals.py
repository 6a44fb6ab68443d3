"""Intervals and tests against scipy, and against simulations of what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from drawn_decisions import drawn
from scipy import stats

from vidreason.evaluation.decisions import Decisions
from vidreason.evaluation.intervals import bootstrap, compare, detectable_difference, over_seeds, sign_flip
from vidreason.evaluation.scores import scores


def decided(right: np.ndarray, groups: list[str] | None = None) -> Decisions:
    """Returns decisions about clips of label 0 that are right where ``right`` is 1."""
    ids = tuple(f"clip{i}" for i in range(len(right)))
    labels = np.zeros(len(right), dtype=np.int64)
    return Decisions(ids, tuple(groups or ids), ("a", "b"), labels, 1 - right.astype(np.int64), None, None, None)


def test_bootstrap_equals_that_of_scipy_for_clips_that_are_their_own_groups() -> None:
    d = drawn(200)
    ours = bootstrap(d)
    assert ours is not None
    theirs = stats.bootstrap((d.right.astype(float),), np.mean, n_resamples=4000, method="percentile", rng=1)
    assert ours["acc"] == pytest.approx(tuple(theirs.confidence_interval), abs=0.012)
    for name, (low, high) in ours.items():
        value = scores(d)[name]
        assert value is not None, name
        assert low - 0.03 < value < high + 0.03, name


def test_bootstrap_draws_groups_and_not_clips() -> None:
    right = np.repeat(np.random.default_rng(0).integers(0, 2, 30), 10)  # ten equal clips a group: 30 observations
    groups = [f"g{i}" for i in range(30) for _ in range(10)]
    by_clip, by_group = bootstrap(decided(right)), bootstrap(decided(right, groups))
    assert by_clip is not None
    assert by_group is not None
    widths = [high - low for low, high in (by_clip["acc"], by_group["acc"])]
    assert widths[1] / widths[0] == pytest.approx(10**0.5, rel=0.1)


def test_no_interval_below_twenty_groups() -> None:
    groups = [f"g{i % 19}" for i in range(100)]
    assert bootstrap(decided(np.ones(100), groups)) is None
    assert bootstrap(decided(np.ones(100), [*groups[:-1], "g19"])) is not None


def test_sign_flip_equals_the_permutation_test_of_scipy() -> None:
    generator = np.random.default_rng(3)
    for n in (8, 60):  # enumerated, drawn
        sums = generator.integers(-1, 2, n).astype(float) + (generator.random(n) < 0.3)
        theirs = stats.permutation_test(
            (sums, np.zeros(n)), lambda a, b: np.sum(a - b), permutation_type="samples", n_resamples=20_000, rng=0
        )
        assert sign_flip(sums) == pytest.approx(theirs.pvalue, abs=0.012)


def test_difference_over_seeds_equals_the_paired_t_interval_of_scipy() -> None:
    generator = np.random.default_rng(0)
    first = [decided((generator.random(80) < 0.8).astype(int)) for _ in range(5)]
    second = [decided((generator.random(80) < 0.7).astype(int)) for _ in range(5)]
    means = [[float(d.right.mean()) for d in side] for side in (first, second)]
    theirs = stats.ttest_rel(*means).confidence_interval(0.95)
    found = compare(first, second)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert found.mean == pytest.approx(np.mean(means[0]) - np.mean(means[1]))
    assert found.seeds == 5
    assert found.p_value is None
    mean, interval = over_seeds(means[0])
    assert interval == pytest.approx(stats.t.interval(0.95, 4, mean, stats.sem(means[0])))


def test_only_clips_that_both_decided_about_are_compared() -> None:
    first, second = decided(np.array([1, 1, 0, 1])), decided(np.array([0, 1, 1, 0]))
    found = compare([first.take([0, 1, 3])], [second.take([3, 2, 0])])
    assert (found.mean, found.clips) == (1.0, 2)  # clips 0 and 3: right against wrong
    with pytest.raises(ValueError, match="different clips"):
        compare([first.take([0])], [second.take([1])])


def test_a_difference_that_could_be_shown_is_shown_four_times_in_five() -> None:
    generator = np.random.default_rng(0)
    n, trials, differ = 200, 300, 0.2  # share of clips that the two methods decide differently
    seen = generator.choice([1.0, -1.0, 0.0], n, p=[differ / 2, differ / 2, 1 - differ])
    difference = detectable_difference(seen, [str(i) for i in range(n)])
    shares = [(differ + difference) / 2, (differ - difference) / 2, 1 - differ]
    found = sum(sign_flip(generator.choice([1.0, -1.0, 0.0], n, p=shares)) < 0.05 for _ in range(trials))
    assert found / trials == pytest.approx(0.8, abs=0.12)


def test_twins_are_one_observation() -> None:
    right = np.array([1, 1] * 40)
    wrong = np.where(np.arange(80) < 20, 0, right)
    alone = compare([decided(right)], [decided(wrong)])
    twins = [f"g{i // 2}" for i in range(80)]
    paired = compare([decided(right, twins)], [decided(wrong, twins)])
    assert alone.p_value is not None
    assert paired.p_value is not None
    assert paired.p_value == pytest.approx(2 / 2**10)  # ten groups differ, all in one direction
    assert alone.p_value < paired.p_value
    assert alone.detectable < paired.detectable
