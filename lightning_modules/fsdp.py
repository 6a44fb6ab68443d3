"""Fully sharded data parallel training (FSDP2): the strategy that YAML names, and what a module does under it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.layout import is_sharded
from vidreason.lightning_modules.vlms.sharding import shard, whole


class FSDP2(ModelParallelStrategy):
    """Parameters, gradients and optimizer state sharded over all processes; checkpoints are one file.

    It runs on CPUs as well (gloo). Which modules are sharded is in ``vlms/sharding.py``.

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

    def setup_environment(self) -> None:
        """Shards over all processes of all nodes; Lightning's ``auto`` would be the number of nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


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
