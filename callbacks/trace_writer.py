"""Appends the texts that ``vidreason predict`` generates to ``traces.jsonl``."""

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
from vidreason.lightning_modules.traces.run_texts import judge_run_texts
from vidreason.run_folder import TRACES_FILE


class TraceWriter(L.Callback):
    """Appends the records that ``predict_step`` returns; a repeated command continues an interrupted run."""

    def __init__(self) -> None:
        self._store: TraceStore | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the trace file of this rank, or creates it.

        Raises:
            ValueError: If the file in the run folder was written with other weights, prompt, task or sampling.
        """
        assert isinstance(pl_module, VLMModule)
        path = Path(trainer.default_root_dir) / TRACES_FILE
        header = pl_module.trace_generator(pl_module.data.task).header
        if trainer.is_global_zero:
            TraceStore.create(path, header)
            join_parts(path)  # an interrupted run may have left parts of other ranks
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
        """Joins the files of all ranks, prints how many texts were rejected and why, and judges descriptions."""
        trainer.strategy.barrier("trace_writer")
        assert isinstance(pl_module, VLMModule)
        if self._store is not None and trainer.is_global_zero:
            self._join(self._store)
        if pl_module.traces.kind == "describe":
            data = pl_module.data
            judge_run_texts(trainer, pl_module.policy, pl_module.trace_generator(data.task), data, data.predict_splits)

    def _join(self, store: TraceStore) -> None:
        join_parts(store.path)
        records = store.records()
        # a reason reads "kind: details"; only kinds are counted
        reasons = Counter(r.reject_reason.split(":")[0] for r in records if r.reject_reason)
        why = "".join(f", {count} rejected ({reason})" for reason, count in reasons.most_common())
        rank_zero_info(f"{store.path}: {len(records)} texts, {sum(r.kept for r in records)} kept{why}")
