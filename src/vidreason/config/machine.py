"""The machine that a stage runs on: devices, processes, what they cost, and ``say``, with which each line is said once.

torch and Lightning are imported where they are needed, so that commands can print and measure before they load them.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning as L

    from vidreason.lightning_modules.base import VLMModule

_CPU = "--trainer.accelerator cpu --trainer.devices 1"


def check_devices(accelerator: str, devices: str | int | list[int]) -> None:
    """Compares what the trainer section asks for with what this machine has.

    ``auto`` with several devices asks for GPUs: as many processes on a CPU would be slower than one.

    Args:
        accelerator: ``trainer.accelerator``.
        devices: ``trainer.devices``.

    Raises:
        ValueError: Naming setting, machine and remedy.
    """
    import torch

    if accelerator not in ("auto", "gpu", "cuda") or (accelerator != "cuda" and torch.backends.mps.is_available()):
        return
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = _wanted(devices)
    if there == 0 and accelerator != "auto":
        raise ValueError(f"trainer.accelerator is {accelerator}, but this machine has no GPU: give {_CPU}")
    if there == 0 and wanted > 1:
        raise ValueError(f"trainer.devices is {devices}, but this machine has no GPU: give {_CPU}")
    if wanted > there > 0:
        raise ValueError(
            f"trainer.devices is {devices}, but this machine has {there} GPU{'s' * (there > 1)}: give "
            f"--trainer.devices {there}, or auto"
        )


def _wanted(devices: str | int | list[int]) -> int:
    """How many devices a setting needs to be there: 4, ``"4"``, ``[0, 3]`` and ``"0,3"`` are all four."""
    if isinstance(devices, list):
        return max(devices, default=-1) + 1
    if isinstance(devices, str):
        words = [word for word in devices.split(",") if word.strip()]
        if not all(word.strip().isdecimal() for word in words):
            return 0  # auto, or what Lightning itself will refuse
        return int(words[0]) if len(words) == 1 and "," not in devices else max(map(int, words)) + 1
    return max(devices, 0)


def describe(trainer: L.Trainer, module: VLMModule, trains: bool = True) -> str:
    """One line: strategy, processes and precision, and what of the model is trained or run.

    Args:
        trainer: Where it runs.
        module: The stage.
        trains: Whether it is a ``fit``.
    """
    number = trainer.num_nodes * trainer.num_devices
    kind = type(trainer.strategy).__name__.removesuffix("Strategy")
    where = f"{kind}, {number} process{'es' if number > 1 else ''}, precision {trainer.precision}"
    adapter, verb = module.adapter_options, "trains" if trains else "runs"
    if adapter is None:
        return f"{where}; {verb} the model's own weights"
    base = "a base in 4 bits (nf4)" if module.vlm.quantize == "nf4" else "a base as it is"
    return f"{where}; {verb} a LoRA adapter (r {adapter.r}) on {base}"


def check_machines(trainer: L.Trainer) -> None:
    """Checks that other machines, if there are to be any, can find this one.

    Raises:
        ValueError: There are to be several, and nothing says where the first is.
    """
    from lightning.pytorch.strategies import ParallelStrategy

    strategy = trainer.strategy
    if trainer.num_nodes == 1 or "MASTER_ADDR" in os.environ or not isinstance(strategy, ParallelStrategy):
        return
    environment = strategy.cluster_environment
    if environment is not None and environment.creates_processes_externally:
        return
    raise ValueError(
        f"trainer.num_nodes is {trainer.num_nodes}, but nothing says where the other machines are: start it with "
        "torchrun or srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each (docs/strategies.md); on one machine "
        "take configs/strategy/ddp.yaml"
    )


def say(text: str) -> None:
    """Prints a line for the user, once however many processes run."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


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
