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
