"""The parts of a GRPO step: the rollouts of some prompts, as many as go through the model at once.

Shape letters: n completions of a part, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from vidreason.lightning_modules.rollout import CompletionBatch, RolloutGroup


@dataclass(frozen=True)
class Part:
    """The rollouts of some prompts of a step: as many as go through the model at once."""

    batch: CompletionBatch
    groups: tuple[RolloutGroup, ...]
    advantages: Tensor
    """[n] one per completion"""
    old_logprobs: Tensor | None = None
    """[n, L]; None where the update's own forward gives them"""
    ref_logprobs: Tensor | None = None
    """[n, L]; None without ``kl_coef``"""


def split_evenly(parts: Sequence[Part], n: int) -> Iterator[list[Part]]:
    """Splits the parts of a step into at most ``n`` minibatches of about equal size, none of them empty."""
    for i in range(n):
        chunk = list(parts[i * len(parts) // n : (i + 1) * len(parts) // n])
        if chunk:
            yield chunk
