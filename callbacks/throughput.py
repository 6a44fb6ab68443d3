"""Logs times of training steps, memory, the number of unreadable clips and the hit rate of the vision cache."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning as L
import torch

from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_modules.base import VLMModule


class Throughput(L.Callback):
    """Logs ``train/step_time``, ``data/wait_s``, ``data/decode_ms`` and ``train/clips_per_s`` for every batch.

    ``data/decode_failures`` is the number of unreadable clips over all ranks in an epoch of training or in a test,
    ``val/decode_failures`` that of a validation. ``vision_cache/hit_rate`` is the share of videos whose embeddings were
    found since it was last logged, ``vision_cache/gb`` the size of the cache in GB. ``memory/*`` is documented at
    :func:`memory_in_gb`.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._started = 0.0
        self._ended: float | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Resets the peaks of the GPU, which are then those of this stage."""
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the memory of a prediction, in which modules cannot log."""
        for logger in trainer.loggers:
            logger.log_metrics(memory_in_gb(pl_module.device), trainer.global_step)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restarts the clock, so that time between epochs does not count as waiting for data."""
        self._ended = time.perf_counter()

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Resets the count of unreadable clips."""
        self._failures = 0

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Resets the count of unreadable clips."""
        self._failures = 0

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the unreadable clips of a batch."""
        self._failures += len(batch.failed) if isinstance(batch, VideoBatch) else 0

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the number of unreadable clips of the validation."""
        pl_module.log("val/decode_failures", float(self._failures), reduce_fx="sum", sync_dist=True)
        pl_module.log_dict(memory_in_gb(pl_module.device))
        log_vision_cache(pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the number of unreadable clips of the test."""
        pl_module.log("data/decode_failures", float(self._failures), reduce_fx="sum", sync_dist=True)
        pl_module.log_dict(memory_in_gb(pl_module.device))
        log_vision_cache(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restarts the clock, so that validation does not count as waiting for data."""
        self._ended = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Records when the step starts."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the times of the step that has just ended."""
        now = time.perf_counter()
        clips = len(batch) if isinstance(batch, VideoBatch) else 0
        values = {"train/step_time": now - self._started}
        if self._ended is not None:
            values["data/wait_s"] = self._started - self._ended
        if isinstance(batch, VideoBatch):
            pl_module.log(
                "data/decode_failures", float(len(batch.failed)), on_step=False, on_epoch=True, reduce_fx="sum",
                sync_dist=True,
            )  # fmt: skip
            values["data/decode_ms"] = batch.decode_ms
            values["train/clips_per_s"] = clips / max(now - (self._ended or self._started), 1e-9)
        values |= memory_in_gb(pl_module.device)
        pl_module.log_dict(values, batch_size=max(1, clips))  # the weight in Lightning's means, which must not be 0
        log_vision_cache(pl_module)
        self._ended = now


def memory_in_gb(device: torch.device) -> dict[str, float]:
    """Returns the memory of this process so far, in GB of 1e9 bytes.

    Args:
        device: Device of the model.

    Returns:
        On a GPU ``memory/allocated`` and ``memory/reserved``: the peaks since the stage began. Elsewhere
        ``memory/resident``: the largest resident memory since the process began, of which the stages of a pipeline
        share one.
    """
    if device.type == "cuda":
        return {
            "memory/allocated": torch.cuda.max_memory_allocated(device) / 1e9,
            "memory/reserved": torch.cuda.max_memory_reserved(device) / 1e9,
        }
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return {"memory/resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}


def log_vision_cache(module: L.LightningModule) -> None:
    """Logs hit rate and size of the vision cache if videos were looked up since the last call."""
    cache = module.vlm.vision_cache if isinstance(module, VLMModule) else None
    taken = None if cache is None else cache.take_statistics()
    if taken is not None and taken.lookups:
        rates = {"vision_cache/hit_rate": taken.hits / taken.lookups, "vision_cache/gb": taken.gb}
        module.log_dict(rates, batch_size=taken.lookups)
