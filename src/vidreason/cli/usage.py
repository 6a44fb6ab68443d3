"""What a stage costs: CPU time and GPUs of this process."""

from __future__ import annotations

import os
import sys


def cpu_seconds() -> float:
    """CPU time of this process and its finished children (data workers)."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def reset_gpu_peak() -> None:
    """Starts to watch which GPUs this process uses."""
    torch = sys.modules.get("torch")  # not imported before the first stage
    if torch is not None and torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def gpus_used() -> int:
    """How many GPUs held memory of this process since the last reset."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0
    return sum(torch.cuda.max_memory_allocated(device) > 0 for device in range(torch.cuda.device_count()))
