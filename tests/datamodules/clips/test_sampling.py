from collections import Counter

import numpy as np
import pytest

from vidreason.datamodules.clips.sampling import balanced_order, fps_indices, segment_indices, uniform_indices


def test_uniform_takes_the_middle_of_each_stretch():
    assert uniform_indices(12, 12) == tuple(range(12))
    assert uniform_indices(100, 4) == (12, 37, 62, 87)
    assert uniform_indices(9, 1) == (4,)


@pytest.mark.parametrize("total", [1, 2, 5, 11])
def test_short_clips_repeat_frames(total):
    draws = np.random.default_rng(0).random(12)
    for indices in (uniform_indices(total, 12), segment_indices(total, 12, draws)):
        assert len(indices) == 12
        assert set(indices) == set(range(total))
        assert list(indices) == sorted(indices)


def test_segment_without_draws_is_uniform():
    assert segment_indices(97, 8) == uniform_indices(97, 8)


def test_segment_jitter_stays_in_its_segment_and_covers_it():
    rng = np.random.default_rng(3)
    taken = [segment_indices(103, 8, rng.random(8)) for _ in range(400)]
    for i in range(8):
        seen = {indices[i] for indices in taken}
        assert seen == set(range(i * 103 // 8, (i + 1) * 103 // 8))


def test_fps_follows_time():
    assert fps_indices(50, 25.0, 2.0, 32) == (0, 12, 25, 37)
    assert fps_indices(30, 30.0, 30.0, 64) == tuple(range(30))
    assert fps_indices(10, 10.0, 30.0, 64) == tuple(i // 3 for i in range(30))
    assert fps_indices(3, 30.0, 1.0, 8) == (0,)


def test_fps_is_capped_evenly():
    assert fps_indices(250, 25.0, 2.0, 4) == uniform_indices(250, 4)


@pytest.mark.parametrize("call", [lambda: uniform_indices(0, 4), lambda: segment_indices(4, 0)])
def test_nothing_out_of_nothing(call):
    with pytest.raises(ValueError, match="cannot take"):
        call()


def test_fps_needs_rates():
    with pytest.raises(ValueError, match="must be positive"):
        fps_indices(10, 0.0, 2.0, 8)


LABELS = ["a"] * 10 + ["b"] * 3 + ["c"] * 5


def test_balanced_order_draws_every_label_equally_often():
    drawn = [balanced_order(LABELS, 18, seed=1, epoch=epoch) for epoch in range(4)]
    for order in drawn:
        assert Counter(LABELS[i] for i in order) == {"a": 6, "b": 6, "c": 6}
        assert all({LABELS[i] for i in order[k : k + 3]} == {"a", "b", "c"} for k in range(0, 18, 3))
    assert len({tuple(order) for order in drawn}) == 4
    of_a = [i for order in drawn for i in order if LABELS[i] == "a"]
    assert sorted(of_a[:10]) == sorted(of_a[10:20]) == list(range(10)), "none again before all others have come"
    assert drawn[0] != balanced_order(LABELS, 18, seed=2, epoch=0)
    assert drawn[0] == balanced_order(LABELS, 18, seed=1, epoch=0)


def test_balanced_order_takes_what_has_no_label_for_one_more():
    assert Counter(balanced_order(["a", None, "a"], 8, 0, 0))[1] == 4
