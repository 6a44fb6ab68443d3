"""Pairs of parameters for the fast tier: every value occurs, but not with every other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def covering(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """Returns all pairs as parameters; those beyond a set in which every value occurs are marked slow.

    Args:
        first: Values of the first argument.
        second: Values of the second argument.
    """
    fast = {(i % len(first), i % len(second)) for i in range(max(len(first), len(second)))}
    return [
        pytest.param(a, b, id=f"{a}-{b}", marks=() if (i, j) in fast else pytest.mark.slow)
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]


def sample(values: Sequence[Any], *fast: Any) -> list[Any]:
    """Returns values as parameters; those that are not among ``fast`` are marked slow.

    Args:
        values: Values of one argument, or tuples with one value for each of several.
        fast: The values that the fast tier takes.

    Raises:
        ValueError: If a value of ``fast`` is not among the values.
    """
    for value in fast:
        if value not in values:
            raise ValueError(f"{value!r} is not among {values!r}")
    return [
        pytest.param(*value if isinstance(value, tuple) else (value,), marks=() if value in fast else pytest.mark.slow)
        for value in values
    ]
