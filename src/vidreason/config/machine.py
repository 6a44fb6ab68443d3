"""On how many processes and machines a stage runs, what it trains there, and what it lacks to do so.

And ``say``, with which all of them say a thing once.
"""

from __future__ import annotations

import os
import sys

import lightning as L
from lightning.pytorch.strategies import ParallelStrategy

from vidreason.lightning_modules.base import VLMModule


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


def refuse_unreachable_machines(trainer: L.Trainer) -> None:
    """Refuses to wait for other machines that cannot find this one.

    Raises:
        ValueError: There are to be several, and nothing says where the first is.
    """
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
