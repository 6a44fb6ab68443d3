"""Refuses a config that asks for GPUs which are not there, before anything is built on it."""

from __future__ import annotations

import torch

_CPU = "--trainer.accelerator cpu --trainer.devices 1"


def refuse_missing_gpus(accelerator: str, devices: str | int | list[int]) -> None:
    """Compares what the trainer section asks for with what this machine has.

    ``auto`` with several devices asks for GPUs: as many processes on a CPU would be slower than one.

    Args:
        accelerator: ``trainer.accelerator``.
        devices: ``trainer.devices``.

    Raises:
        ValueError: Naming setting, machine and remedy.
    """
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
