"""Appends what ``vidreason predict`` generates to ``traces.jsonl``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from vidreason.datamodules.trace_parts import join_parts, own_part
from vidreason.datamodules.traces import TraceRecord, TraceStore
from vidreason.lightning_modules.base import VLMModule
from vidreason.run_folder import TRACES_FILE


class TraceWriter(L.Callback):
    """Appends the records that ``predict_step`` returns; an interrupted run goes on where it was."""

    def __init__(self) -> None:
        self._store: TraceStore | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the file, or begins it.

        Raises:
            ValueError: The file in the run folder was begun by other weights, prompt, task or sampling.
        """
        assert isinstance(pl_module, VLMModule)
        path = Path(trainer.default_root_dir) / TRACES_FILE
        header = pl_module.trace_generator(pl_module.data.task).header
        if trainer.is_global_zero:
            TraceStore.create(path, header)
            join_parts(path)
        trainer.strategy.barrier("trace_writer")
        self._store = own_part(path, header, trainer.global_rank)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Appends the records of a batch."""
        records: tuple[TraceRecord, ...] = outputs["traces"] if isinstance(outputs, Mapping) else ()
        assert self._store is not None
        if records:
            self._store.append(records)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says how many texts there are and why some were rejected."""
        trainer.strategy.barrier("trace_writer")
        if self._store is None or not trainer.is_global_zero:
            return
        join_parts(self._store.path)
        records = self._store.records()
        reasons = Counter(r.reject_reason.split(":")[0] for r in records if r.reject_reason)
        why = "".join(f", {count} rejected ({reason})" for reason, count in reasons.most_common())
        rank_zero_info(f"{self._store.path}: {len(records)} texts, {sum(r.kept for r in records)} kept{why}")
