"""The machine that a stage runs on: checks of devices, measured CPU and GPU use, and printing once per machine.

torch and Lightning are imported inside functions, so that commands can print and measure before they load them.
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
    """Checks that this machine has the devices that the trainer section asks for.

    ``auto`` with several devices means GPUs: several processes on a CPU would be slower than one.

    Args:
        accelerator: ``trainer.accelerator``.
        devices: ``trainer.devices``.

    Raises:
        ValueError: If devices are missing; the message names setting, machine and remedy.
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
    """Returns how many devices must exist for a setting: four for 4, ``"4"``, ``[0, 3]`` and ``"0,3"``."""
    if isinstance(devices, list):
        return max(devices, default=-1) + 1
    if isinstance(devices, str):
        words = [word for word in devices.split(",") if word.strip()]
        if not all(word.strip().isdecimal() for word in words):
            return 0  # auto, or a value that Lightning itself rejects
        return int(words[0]) if len(words) == 1 and "," not in devices else max(map(int, words)) + 1
    return max(devices, 0)  # -1 means all that exist


def describe(trainer: L.Trainer, module: VLMModule, trains: bool = True) -> str:
    """Returns one line with strategy, processes, precision and the trained part of the model.

    Args:
        trainer: The trainer of the stage.
        module: The stage.
        trains: Whether the command is ``fit``.
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
    """Checks that the processes of a run on several machines can find each other.

    Raises:
        ValueError: If ``num_nodes`` is above 1 and neither a launcher nor MASTER_ADDR gives the first machine.
    """
    from lightning.pytorch.strategies import ParallelStrategy

    # Lightning would use 127.0.0.1 then, and every machine would wait for the others until a timeout
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
    """Prints a line to stderr, once per machine however many processes run."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def cpu_seconds() -> float:
    """Returns the CPU time in seconds of this process and its finished children (data workers)."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def reset_gpu_peak() -> None:
    """Resets the peak memory of all GPUs, for :func:`gpus_used`."""
    torch = sys.modules.get("torch")  # not imported before the first stage
    if torch is not None and torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def gpus_used() -> int:
    """Returns how many GPUs held memory of this process since the last :func:`reset_gpu_peak`."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0
    return sum(torch.cuda.max_memory_allocated(device) > 0 for device in range(torch.cuda.device_count()))
