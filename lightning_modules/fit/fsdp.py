"""Fully sharded data parallel training (FSDP2): the strategy for YAML files, and the sharding of a stage's models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from vidreason.lightning_internals import (
    load_unsharded_state,
    shard_over_all_processes,
    torch_optimizer,
)
from vidreason.lightning_modules.vlms.loading.sharding import shard, unsharded
from vidreason.lightning_modules.vlms.prefix.layout import is_sharded


class FSDP2(ModelParallelStrategy):
    """Shards parameters, gradients and optimizer state over all processes; a checkpoint is one file.

    It also runs on CPUs (gloo). ``vlms/loading/sharding.py`` defines which modules are sharded. Validation, test and
    prediction run on gathered weights, because ranks may have different numbers of batches there.

    Args:
        timeout_s: Seconds that a rank waits for another one before it fails.
    """

    def __init__(self, timeout_s: float = 1800.0) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=timedelta(seconds=timeout_s),
        )
        self._gathered = ExitStack()

    def setup_environment(self) -> None:
        """Sets the size of the device mesh to all processes of all nodes, then builds it."""
        shard_over_all_processes(self)
        super().setup_environment()

    # ------------------------------------------------------------------ evaluation on gathered weights

    def on_validation_start(self) -> None:
        """Gathers the sharded weights; Lightning runs the hooks of callbacks and module before this one."""
        module: Any = self.lightning_module
        self._gathered.enter_context(unsharded(getattr(module, "policy", module)))

    def on_validation_end(self) -> None:
        """Shards the weights again."""
        self._gathered.close()

    on_test_start = on_validation_start
    on_test_end = on_validation_end
    on_predict_start = on_validation_start
    on_predict_end = on_validation_end

    # ------------------------------------------------------------------ checkpoints

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the full state on rank 0, with trained parameters numbered as by a strategy that does not shard."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # a collective: every rank takes part
        assert self.model is not None
        state = get_optimizer_state_dict(self.model, torch_optimizer(optimizer), options=options)
        numbers = {name: number for number, name in enumerate(_trained_names(self.model))}
        return _renamed(state, numbers) if self.global_rank == 0 else {}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads weights and optimizer state from a checkpoint of any strategy, and returns the rest."""
        path = Path(self.broadcast(checkpoint_path))
        checkpoint: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        assert self.model is not None
        assert self.lightning_module is not None
        strict = self.lightning_module.strict_loading
        load_unsharded_state(checkpoint.pop("state_dict"), self.model, strict=strict)
        names = dict(enumerate(_trained_names(self.model)))
        options = StateDictOptions(broadcast_from_rank0=True, full_state_dict=True, strict=strict)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            set_optimizer_state_dict(self.model, optimizer, _renamed(state, names), options=options)
        return checkpoint


def shard_weights(strategy: Strategy, models: Sequence[nn.Module], frozen: Sequence[str]) -> None:
    """Shards models over the ranks in place if the strategy shards; otherwise does nothing.

    Args:
        strategy: The trainer's strategy.
        models: The models of a stage; each is sharded separately.
        frozen: Dotted names of modules that are not sharded.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    for model in models:
        if not is_sharded(model):
            shard(model, strategy.device_mesh["data_parallel"], frozen)


def _trained_names(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def _renamed(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns an optimizer state whose parameters are renamed by ``names`` and stand in its order."""
    place = {name: number for number, name in enumerate(names)}
    return {
        "state": {names[name]: values for name, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[name] for name in sorted(group["params"], key=lambda name: place[name])]}
            for group in state["param_groups"]
        ],
    }
