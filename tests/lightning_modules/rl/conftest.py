"""A policy and what it wrote about one batch of clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from small_grpo import make

from vidreason.lightning_modules.grpo import GRPOModule
from vidreason.lightning_modules.rl.metrics import Stopwatch
from vidreason.lightning_modules.rl.microbatch import ScoredRollouts


@pytest.fixture
def rolled(make_vlm: Callable[..., Any], ready: Callable[..., Any]) -> tuple[GRPOModule, ScoredRollouts]:
    """A stage with a reference, and the four completions that it wrote about each of three clips."""
    module: GRPOModule = ready(make(make_vlm(), kl_coef=0.1))
    (scored,) = module.sample(next(iter(module.data.train_dataloader())), Stopwatch())
    return module, scored
