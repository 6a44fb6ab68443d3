"""Temperature scaling against a grid search, scores against hand-computed numbers."""

import math

import pytest
import torch

from vidreason.lightning_modules.functional.calibration import (
    apply_temperature,
    brier,
    fit_temperature,
    nll,
)


def drawn(true_temperature: float, clips: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are too sharp by ``true_temperature`` for the labels drawn from them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(clips, 4, generator=generator) * 2
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    return logits * true_temperature, labels


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 3.0])
def test_fit_is_the_minimum_of_a_grid(true_temperature: float) -> None:
    logits, labels = drawn(true_temperature)
    fit = fit_temperature(logits, labels)

    def loss(temperature: float) -> float:
        return torch.nn.functional.cross_entropy(logits.double() / temperature, labels).item()

    grid = [0.1 * 1.005**i for i in range(924)]
    assert fit.temperature == pytest.approx(min(grid, key=loss), rel=5e-3)
    assert fit.temperature == pytest.approx(true_temperature, rel=0.2)
    assert fit.nll_before == pytest.approx(loss(1.0))
    assert fit.nll_after == pytest.approx(loss(fit.temperature))
    assert fit.nll_after <= min(map(loss, grid)) + 1e-12
    assert not fit.at_bound


def test_fit_does_not_care_about_a_constant_per_clip() -> None:
    logits, labels = drawn(2.0)
    shifted = logits.double() - 1e4 * torch.arange(len(logits)).unsqueeze(1)
    assert fit_temperature(shifted, labels).temperature == pytest.approx(
        fit_temperature(logits, labels).temperature, rel=1e-6
    )


def test_fit_at_its_bounds() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    right, wrong = torch.tensor([0, 1]), torch.tensor([1, 0])
    sharp = fit_temperature(logits, right)
    assert (sharp.temperature, sharp.at_bound) == (pytest.approx(0.1), True)
    flat = fit_temperature(logits, wrong, max_temperature=5.0)
    assert (flat.temperature, flat.at_bound) == (pytest.approx(5.0), True)
    assert fit_temperature(logits, right, min_temperature=0.5).temperature == pytest.approx(0.5)
    nothing = fit_temperature(torch.zeros(3, 2), torch.tensor([0, 1, 0]))
    assert (nothing.temperature, nothing.at_bound) == (1.0, False)


def test_fit_errors() -> None:
    with pytest.raises(ValueError, match="N >= 1"):
        fit_temperature(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="finite"):
        fit_temperature(torch.tensor([[0.0, -math.inf]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="min_temperature"):
        fit_temperature(torch.zeros(1, 2), torch.tensor([0]), min_temperature=2.0, max_temperature=1.0)


def test_apply_temperature() -> None:
    logits = torch.tensor([[math.log(1.0), math.log(9.0)]])
    torch.testing.assert_close(apply_temperature(logits, 1.0), torch.tensor([[0.1, 0.9]]))
    torch.testing.assert_close(apply_temperature(logits, 2.0), torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(apply_temperature(logits.log_softmax(-1), 2.0), torch.tensor([[0.25, 0.75]]))
    with pytest.raises(ValueError, match="positive"):
        apply_temperature(logits, 0.0)


def test_nll_and_brier_by_hand() -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0]])
    labels = torch.tensor([1, 0])
    assert nll(probs, labels).tolist() == pytest.approx([-math.log(0.2), -math.log(1e-12)], rel=1e-5)
    assert brier(probs, labels).tolist() == pytest.approx([0.49 + 0.64 + 0.01, 2.0])
    assert brier(probs, torch.tensor([0, 2])).tolist() == pytest.approx([0.09 + 0.04 + 0.01, 0.0])
    with pytest.raises(ValueError, match=r"\[N, C\]"):
        brier(probs, labels[:1])
