"""Temperature scaling, and what says whether probabilities can be trusted.

Shape letters: N clips, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = 200
_SMALLEST = 1e-12


class TemperatureFit(NamedTuple):
    """A fitted temperature and what it changed on the clips it was fitted on."""

    temperature: float
    nll_before: float
    nll_after: float
    at_bound: bool
    """True where the clips would push the temperature further: all right or (nearly) all wrong, or too few."""


def fit_temperature(
    logits: Tensor, labels: Tensor, *, min_temperature: float = 0.1, max_temperature: float = 10.0
) -> TemperatureFit:
    """Finds the temperature with the least negative log-likelihood.

    The NLL is convex in 1/temperature, so bisection of its derivative, in float64, finds the minimum exactly and the
    same on every machine.

    Args:
        logits: [N, C], or log-probabilities (of averaged traces, say).
        labels: [N] int64.
        min_temperature: Lower bound. A small split that is all right would otherwise ask for temperature 0.
        max_temperature: Upper bound.

    Returns:
        The temperature, with the NLL at 1 and at the temperature.

    Raises:
        ValueError: There are no clips, the shapes do not fit, or a logit is not finite.
    """
    _check(logits, labels)
    if not 0 < min_temperature <= max_temperature:
        raise ValueError(f"need 0 < min_temperature <= max_temperature, got {min_temperature} and {max_temperature}")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("logits must be finite to fit a temperature on them")
    # A constant per clip changes no probability; taking the maximum off keeps the sums below small.
    exact = logits.detach().double()
    exact = exact - exact.amax(-1, keepdim=True)
    truth = exact.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    def slope(inverse: float) -> float:
        """Derivative of the mean NLL with respect to 1/temperature."""
        return float((((exact * inverse).softmax(-1) * exact).sum(-1) - truth).mean())

    def mean_nll(temperature: float) -> float:
        return float(((exact / temperature).logsumexp(-1) - truth / temperature).mean())

    low, high = 1.0 / max_temperature, 1.0 / min_temperature
    at_bound = False
    if slope(low) == slope(high) == 0.0:
        # Equal logits everywhere: no temperature changes anything.
        inverse = min(max(1.0, low), high)
    elif slope(low) >= 0.0:
        inverse, at_bound = low, True
    elif slope(high) <= 0.0:
        inverse, at_bound = high, True
    else:
        for _ in range(_STEPS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if slope(middle) < 0.0 else (low, middle)
        inverse = 0.5 * (low + high)
    temperature = 1.0 / inverse
    return TemperatureFit(temperature, mean_nll(1.0), mean_nll(temperature), at_bound)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities of temperature-scaled logits.

    Args:
        logits: [..., C], or log-probabilities.
        temperature: Above 1 flattens, below 1 sharpens; never changes the best class.

    Returns:
        [..., C] at least float32.

    Raises:
        ValueError: The temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).softmax(-1)


def nll(probs: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of the true class.

    Args:
        probs: [N, C].
        labels: [N] int64.

    Returns:
        [N]; at most -log 1e-12 = 27.6, so that one certain mistake leaves the mean finite.

    Raises:
        ValueError: The shapes do not fit.
    """
    _check(probs, labels)
    return -probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1).clamp(min=_SMALLEST).log()


def brier(probs: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of the probabilities from the truth, summed over classes.

    Args:
        probs: [N, C].
        labels: [N] int64.

    Returns:
        [N] between 0 and 2.

    Raises:
        ValueError: The shapes do not fit.
    """
    _check(probs, labels)
    truth = torch.nn.functional.one_hot(labels, probs.shape[-1])
    return (probs - truth).square().sum(-1)


def _check(scores: Tensor, labels: Tensor) -> None:
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(labels):
        raise ValueError(
            f"expected scores [N, C] and labels [N] with N >= 1, got {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
