"""GRPO on the small base: few, short completions, and a reward that a random policy gets now and then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from vidreason.lightning_modules.decisions.deciders import DecideOptions
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.grpo import GRPOModule, PolicyUpdateOptions
from vidreason.lightning_modules.rl.objective import PolicyLoss
from vidreason.lightning_modules.rl.sampler import RolloutOptions
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM
from vidreason.rewards.base import RewardFn, RewardInput

SHORT = Sampling(max_new_tokens=6)
_GROUPS: dict[str, type] = {
    "rollouts": RolloutOptions,
    "loss": PolicyLoss,
    "updates": PolicyUpdateOptions,
    "optim": OptimOptions,
    "decide": DecideOptions,
}
_SHORTER = {
    "loss_type": ("loss", "type"),
    "train_sampling": ("rollouts", "sampling"),
    "cold_steps": ("rollouts", "max_unparsed_steps"),
    "prompts_per_forward": ("updates", "clips_per_forward"),
    "sampling": ("decide", "sampling"),
    "samples": ("decide", "samples"),
}
"""Keywords of ``make`` whose option has another name"""
_PLACES = {
    field.name: (group, field.name)
    for group, options in _GROUPS.items()
    for field in fields(options)
    if field.name not in ("sampling", "samples", "type", "by")
} | _SHORTER


class EvenTokens(RewardFn):
    """A reward that a random policy gets now and then: the share of words of even length."""

    def __call__(self, item: RewardInput) -> float:
        words = item.completion.split() or [""]
        return sum(len(word) % 2 == 0 for word in words) / len(words)


def make(vlm: TinyVLM, kind: type[GRPOModule] = GRPOModule, **kwargs: Any) -> GRPOModule:
    """A module of four completions a prompt and plain SGD, unless ``kwargs`` say otherwise.

    Args:
        vlm: The model family.
        kind: The class.
        kwargs: Of the class, or single options: ``kl_coef=0.1`` is ``loss=PolicyLoss(kl_coef=0.1)`` beside whatever
            else ``loss`` has.
    """
    defaults: dict[str, Any] = {"rewards": [EvenTokens()], "group_size": 4, "warmup": 0, "cold_steps": 10**6}
    defaults |= {"train_sampling": SHORT, "sampling": SHORT, "optimizer": lambda p: torch.optim.SGD(p, lr=1e-2)}
    return kind(vlm, **grouped({**defaults, **kwargs}))


def grouped(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``GRPOModule`` from single options; a group that is given as a whole comes first."""
    arguments = {name: value for name, value in options.items() if name not in _PLACES}
    single: dict[str, dict[str, Any]] = {"optim": {"warmup": 10}, "decide": {"by": "answer"}}
    for name, value in options.items():
        if name in _PLACES and _PLACES[name][0] not in arguments:
            group, field = _PLACES[name]
            single.setdefault(group, {})[field] = value
    return {**{group: _GROUPS[group](**values) for group, values in single.items()}, **arguments}
