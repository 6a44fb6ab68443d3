"""States of the random number generators of a process as plain containers, and seeding per batch."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch

State = dict[str, Any]


def seed_batch(seed: int, batches: int, rank: int) -> None:
    """Seeds Python, NumPy and torch for a batch, so that dropout does not depend on earlier batches.

    Args:
        seed: The run's seed.
        batches: Number of finished batches of the fit.
        rank: Rank of this process.
    """
    digest = hashlib.sha256(f"{seed}/{batches}/{rank}".encode()).digest()
    number = int.from_bytes(digest[:8], "big")
    torch.manual_seed(number >> 1)
    np.random.seed(number % 2**32)  # NumPy accepts 32 bits only
    random.seed(number)


def random_state() -> State:
    """Returns the states of this process's random number generators."""
    version, numbers, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        # A tensor, since torch.load(..., weights_only=True) rejects NumPy arrays.
        "numpy": [kind, torch.tensor(np.asarray(keys, dtype=np.int64)), place, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: State) -> None:
    """Restores the states of this process's random number generators."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
