"""Numbers that must be finite: a run stops where the first NaN or infinity arises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class NonFiniteError(ValueError):
    """Raised if a loss, gradient, weight or log-probability is NaN or infinite."""


def check_rows(values: Tensor, names: Sequence[str], what: str) -> None:
    """Checks that every row of numbers is finite.

    Args:
        values: [B, ...] numbers.
        names: [B] names of the rows, for the message.
        what: What the numbers are.

    Raises:
        NonFiniteError: If a row has a NaN or an infinity.
    """
    finite = torch.isfinite(values).flatten(1).all(1)
    if not bool(finite.all()):
        bad = [name for name, good in zip(names, finite.tolist(), strict=True) if not good]
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise NonFiniteError(
            f"{what} not finite, clips {shown}: use weights of a stage that trained well, a lower learning rate, or a "
            "wider trainer.precision"
        )


def check_weights(state: Mapping[str, Tensor], place: str, remedy: str) -> None:
    """Checks that weights are finite.

    Args:
        state: Weights by name; entries that are not floating point are skipped.
        place: Where they come from or go to, at the beginning of the message.
        remedy: What to do, at its end.

    Raises:
        NonFiniteError: If a weight is NaN or infinite.
    """
    bad = [name for name, value in state.items() if not is_finite(value)]
    if bad:
        raise NonFiniteError(f"{place}: {len(bad)} of {len(state)} weights are not finite, such as {bad[0]}: {remedy}")


def is_finite(values: Tensor) -> bool:
    """Returns whether all numbers are finite, without a copy of them; True for integers and packed weights."""
    if not values.is_floating_point() or not values.numel():
        return True
    if values.element_size() == 1:  # 8-bit floating point has no minimum in torch
        values = values.float()
    return bool(torch.isfinite(torch.stack(torch.aminmax(values.detach()))).all())  # aminmax propagates NaN
