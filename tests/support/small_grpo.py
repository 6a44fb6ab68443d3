"""GRPO on the small base: few, short completions, and a reward that a random policy gets now and then."""

from __future__ import annotations

from typing import Any

import torch

from vidreason.lightning_modules.grpo import GRPOModule
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM
from vidreason.rewards.base import RewardFn, RewardInput

SHORT = Sampling(max_new_tokens=6)


class EvenTokens(RewardFn):
    """A reward that a random policy gets now and then: the share of words of even length."""

    def __call__(self, item: RewardInput) -> float:
        words = item.completion.split() or [""]
        return sum(len(word) % 2 == 0 for word in words) / len(words)


def make(vlm: TinyVLM, **kwargs: Any) -> GRPOModule:
    """A module of four completions a prompt and plain SGD, unless ``kwargs`` say otherwise."""
    defaults: dict[str, Any] = {"rewards": [EvenTokens()], "group_size": 4, "warmup": 0, "cold_steps": 10**6}
    defaults |= {"train_sampling": SHORT, "sampling": SHORT, "optimizer": lambda p: torch.optim.SGD(p, lr=1e-2)}
    return GRPOModule(vlm, **{**defaults, **kwargs})
