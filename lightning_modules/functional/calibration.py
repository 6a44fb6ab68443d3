"""Temperature scaling (arXiv 1706.04599) and proper scores of probabilities.

Shape letters: N clips, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = 200  # of bisection; float64 is exhausted after about 60
_SMALLEST = 1e-12


class TemperatureFit(NamedTuple):
    """A fitted temperature, and the mean NLL in nats of the clips that it was fitted on."""

    temperature: float
    nll_before: float
    nll_after: float
    at_bound: bool
    """True if the optimum lies beyond a bound: (nearly) all clips are right or wrong, or there are too few."""


def fit_temperature(
    logits: Tensor, labels: Tensor, *, min_temperature: float = 0.1, max_temperature: float = 10.0
) -> TemperatureFit:
    """Fits the temperature that minimises the mean negative log-likelihood.

    The NLL is convex in 1/temperature, so that bisection of its derivative in float64 finds the minimum exactly, with
    the same result on every machine.

    Args:
        logits: [N, C] logits or log-probabilities, for example the averages over reasoning traces.
        labels: [N] int64.
        min_temperature: Lower bound; a small split with correct predictions only would otherwise get temperature 0.
        max_temperature: Upper bound.

    Returns:
        The temperature, with the NLL at temperature 1 and at the fitted one.

    Raises:
        ValueError: If there are no clips, the shapes do not fit, or a logit is not finite.
    """
    _check(logits, labels)
    if not 0 < min_temperature <= max_temperature:
        raise ValueError(f"need 0 < min_temperature <= max_temperature, got {min_temperature} and {max_temperature}")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("logits must be finite to fit a temperature on them")
    # A constant per clip changes no probability; subtracting the maximum keeps the sums below small.
    exact = logits.detach().double()
    exact = exact - exact.amax(-1, keepdim=True)
    truth = exact.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    def slope(inverse: float) -> float:
        """Returns the derivative of the mean NLL with respect to 1/temperature."""
        return float((((exact * inverse).softmax(-1) * exact).sum(-1) - truth).mean())

    def mean_nll(temperature: float) -> float:
        return float(((exact / temperature).logsumexp(-1) - truth / temperature).mean())

    # ``slope`` increases with 1/temperature, since the NLL is convex in it: its sign at a bound says where the root is.
    low, high = 1.0 / max_temperature, 1.0 / min_temperature
    at_bound = False
    if slope(low) == slope(high) == 0.0:
        # The logits of each clip are equal, so that no temperature changes the NLL.
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
    """Returns the probabilities of temperature-scaled logits.

    Args:
        logits: [..., C] logits or log-probabilities.
        temperature: Values above 1 flatten, values below 1 sharpen; the likeliest class stays the same.

    Returns:
        [..., C] at least float32.

    Raises:
        ValueError: If the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).softmax(-1)


def nll(probs: Tensor, labels: Tensor) -> Tensor:
    """Returns the negative log-likelihood of the true class.

    Args:
        probs: [N, C].
        labels: [N] int64.

    Returns:
        [N] in nats; at most -log 1e-12 = 27.6, so that the mean stays finite if a probability is 0.

    Raises:
        ValueError: If the shapes do not fit.
    """
    _check(probs, labels)
    return -probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1).clamp(min=_SMALLEST).log()


def brier(probs: Tensor, labels: Tensor) -> Tensor:
    """Returns the Brier score: the squared distance between probabilities and truth, summed over classes.

    Args:
        probs: [N, C].
        labels: [N] int64.

    Returns:
        [N] between 0 and 2.

    Raises:
        ValueError: If the shapes do not fit.
    """
    _check(probs, labels)
    truth = torch.nn.functional.one_hot(labels, probs.shape[-1])
    return (probs - truth).square().sum(-1)


def _check(scores: Tensor, labels: Tensor) -> None:
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(labels):
        raise ValueError(
            f"expected scores [N, C] and labels [N] with N >= 1, got {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
