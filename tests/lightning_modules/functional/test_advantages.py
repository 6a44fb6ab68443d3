"""Group-relative advantages: hand-computed numbers, and exact zeros where there is nothing to learn."""

import statistics

import pytest
import torch

from vidreason.lightning_modules.functional.advantages import dead_groups, group_relative_advantages


def test_hand_computed() -> None:
    rewards = torch.tensor([[2.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    # Group 1: mean 1, ddof-1 variance 2/3. Group 2: mean 1/4, ddof-1 variance (3/16 + 9/16) / 3 = 1/4.
    deviation = (2 / 3) ** 0.5
    expected = torch.tensor([[1 / deviation, 0, 0, -1 / deviation], [-0.5, -0.5, -0.5, 1.5]])
    torch.testing.assert_close(group_relative_advantages(rewards), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_each_scale_against_the_statistics_module(scale: str) -> None:
    rows = [[1.2, 0.0, 2.2, 1.0], [5.0, 1.0, 1.0, 0.5], [2.0, 2.0, 2.0, 2.0]]
    advantages = group_relative_advantages(torch.tensor(rows, dtype=torch.float64), scale=scale)  # type: ignore[arg-type]
    everything = [reward for row in rows for reward in row]
    for row, computed in zip(rows, advantages.tolist(), strict=True):
        divisor = {"group": statistics.stdev(row), "batch": statistics.stdev(everything), "none": 1 - 1e-6}[scale]
        assert computed == pytest.approx([(r - statistics.mean(row)) / (divisor + 1e-6) for r in row], abs=1e-12)


def test_every_flag_changes_the_numbers() -> None:
    rewards = torch.tensor([[2.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    results = [
        group_relative_advantages(rewards),
        group_relative_advantages(rewards, eps=0.1),
        group_relative_advantages(rewards, scale="batch"),
        group_relative_advantages(rewards, scale="none"),
    ]
    assert len({tuple(result.flatten().tolist()) for result in results}) == len(results)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_dead_groups_are_exactly_zero(scale: str) -> None:
    rewards = torch.full((2, 8), 1.2)
    rewards[1, 0] = 0.0
    naive = (rewards[0] - rewards[0].mean()) / (rewards[0].std() + 1e-6)
    assert naive.abs().max() > 0.01, "the naive float32 formula no longer shows the problem"
    advantages = group_relative_advantages(rewards, scale=scale)  # type: ignore[arg-type]
    assert (advantages[0] == 0).all()
    assert (advantages[1] != 0).all()
    assert dead_groups(rewards).tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_groups_of_any_size_and_value_are_exactly_zero(dtype: torch.dtype) -> None:
    for size in range(1, 14):
        rewards = torch.tensor([0.1, 1.2, 1 / 3, 2.7], dtype=dtype).unsqueeze(1).expand(4, size)
        assert (group_relative_advantages(rewards) == 0).all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_of_one(scale: str) -> None:
    for rewards in (torch.tensor([[1.7]]), torch.tensor([[1.7], [0.3]])):
        assert (group_relative_advantages(rewards, scale=scale) == 0).all()  # type: ignore[arg-type]
        assert dead_groups(rewards).all()


def test_types_and_purity() -> None:
    rewards = torch.tensor([[0, 1]])
    assert group_relative_advantages(rewards).dtype == torch.float32
    assert group_relative_advantages(rewards.double()).dtype == torch.float64
    assert rewards.tolist() == [[0, 1]]


def test_errors() -> None:
    for wrong in (torch.zeros(3), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match=r"\[B, G\]"):
            group_relative_advantages(wrong)
    with pytest.raises(ValueError, match="finite"):
        group_relative_advantages(torch.tensor([[0.0, float("inf")]]))
    with pytest.raises(ValueError, match="scale"):
        group_relative_advantages(torch.tensor([[0.0, 1.0]]), scale="std")  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_what_could_not_be_scored_is_in_no_mean(scale: str) -> None:
    nan = float("nan")
    rewards = torch.tensor([[1.0, nan, 0.0, 0.5], [nan, nan, nan, 3.0], [2.0, 2.0, nan, 2.0]], dtype=torch.float64)
    advantages = group_relative_advantages(rewards, scale=scale)  # type: ignore[arg-type]
    deviation = {"group": statistics.stdev([1, 0, 0.5]), "batch": statistics.stdev([1, 0, 0.5, 3, 2, 2, 2]), "none": 1}
    eps = 0 if scale == "none" else 1e-6
    expected = [0.5 / (deviation[scale] + eps), 0, -0.5 / (deviation[scale] + eps), 0]
    assert advantages[0].tolist() == pytest.approx(expected, abs=1e-12)
    assert advantages[1:].tolist() == [[0.0] * 4] * 2, "one score is no comparison, equal scores are none either"
    assert dead_groups(rewards).tolist() == [False, True, True]
    assert dead_groups(torch.tensor([[nan, nan]])).tolist() == [True]
