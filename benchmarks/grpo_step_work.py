"""Common parts of both sides of ``grpo_step_vs_trl.py``: reward, pictures, prompt length and clock."""

from __future__ import annotations

import resource
import time
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

FRAMES, IMAGES = 16, 8
LEARNING_RATE = 1e-5


def hash_of(text: str) -> float:
    """Returns a reward in [0, 1) that differs between completions and is the same on both sides."""
    return zlib.crc32(text.encode()) % 997 / 997


def picture(number: int, side: int) -> Tensor:
    """Returns noise, [3, side, side] uint8."""
    return torch.randint(0, 256, (3, side, side), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)


def prompt_length(side: int) -> int:
    """Returns the number of tokens of every prompt: visual tokens of eight images, and 37 of text."""
    return IMAGES * (side // 28) ** 2 + 37


class Clock:
    """Measures CPU-seconds of steps and updates; in the first step it counts FLOPs and encoded patches instead."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.updates: list[float] = []
        self.patches = 0
        self.flops = FlopCounterMode(display=False)
        self._update = 0.0

    def watch(self, tower: nn.Module) -> None:
        """Starts counting FLOPs, and patches that enter the vision tower."""
        self._hook = tower.register_forward_pre_hook(self._count)
        self.flops.__enter__()

    def _count(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.patches += len(given[0])

    def begin_update(self) -> None:
        """Records that the rollouts are scored and the update begins."""
        self._update = time.process_time()

    def end_step(self) -> None:
        """Records that the optimizer has stepped."""
        if not self.ends:
            self.flops.__exit__(None, None, None)
            self._hook.remove()
        self.ends.append(time.process_time())
        self.updates.append(self.ends[-1] - self._update)

    def result(self, prompt_tokens: int, completion_tokens: float, grad_norm: float) -> dict[str, Any]:
        """Returns the measurements of the variant."""
        return {
            "step": [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)],
            "update": self.updates[1:],  # counting FLOPs slows the first step down
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "step_gflop": round(self.flops.get_total_flops() / 1e9, 1),
            "vision_patches": self.patches,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,  # KiB on Linux
            "grad_norm": grad_norm,
        }
