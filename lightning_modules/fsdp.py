"""Fully sharded data parallel training (FSDP2): the strategy that YAML names, and what a module does under it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.strategies.model_parallel import _load_raw_module_state
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.sharding import shard, whole
from vidreason.lightning_modules.vlms.prefix.layout import is_sharded


class FSDP2(ModelParallelStrategy):
    """Parameters, gradients and optimizer state sharded over all processes; checkpoints are one file.

    It runs on CPUs as well (gloo). Which modules are sharded is in ``vlms/loading/sharding.py``.

    Args:
        timeout_s: Seconds after which a rank that waits for another gives up.
    """

    def __init__(self, timeout_s: float = 1800.0) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=timedelta(seconds=timeout_s),
        )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on the first rank, numbered as in one process: by trained parameters alone."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        assert self.model is not None
        state = get_optimizer_state_dict(self.model, plain, options=options)
        numbers = {name: number for number, name in enumerate(_trained_names(self.model))}
        return _renamed(state, numbers) if self.global_rank == 0 else {}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads weights and optimizer, from a checkpoint of any strategy; returns the rest."""
        path = Path(self.broadcast(checkpoint_path))
        checkpoint: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        assert self.model is not None
        assert self.lightning_module is not None
        strict = self.lightning_module.strict_loading
        _load_raw_module_state(checkpoint.pop("state_dict"), self.model, strict=strict)
        names = dict(enumerate(_trained_names(self.model)))
        options = StateDictOptions(broadcast_from_rank0=True, full_state_dict=True, strict=strict)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            set_optimizer_state_dict(self.model, optimizer, _renamed(state, names), options=options)
        return checkpoint

    def setup_environment(self) -> None:
        """Shards over all processes of all nodes; Lightning's ``auto`` would be the number of nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def _trained_names(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def _renamed(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with other names of its parameters, in the order of ``names``."""
    place = {name: number for number, name in enumerate(names)}
    return {
        "state": {names[name]: values for name, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[name] for name in sorted(group["params"], key=lambda name: place[name])]}
            for group in state["param_groups"]
        ],
    }


class ShardedModule(L.LightningModule):
    """Weights that a strategy may shard: gathered as a whole wherever ranks may run unequal forwards."""

    vlm: VLM

    def __init__(self) -> None:
        super().__init__()
        self._gathered = ExitStack()

    def weights(self) -> Sequence[nn.Module]:
        """Returns the models to shard, the trained one first."""
        raise NotImplementedError

    def shard_weights(self) -> None:
        """Shards what was built over the ranks, under a strategy that does so."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, ModelParallelStrategy):
            return
        frozen = self.vlm.vision_modules if self.vlm.freeze_vision else ()
        for model in self.weights():
            if not is_sharded(model):
                shard(model, strategy.device_mesh["data_parallel"], frozen)

    def on_validation_start(self) -> None:
        """Gathers sharded weights: ranks may have unequal numbers of batches."""
        self._gathered.enter_context(whole(self.weights()[0]))

    def on_validation_end(self) -> None:
        """Shards them again."""
        self._gathered.close()

    on_test_start = on_validation_start
    on_test_end = on_validation_end
    on_predict_start = on_validation_start
    on_predict_end = on_validation_end
