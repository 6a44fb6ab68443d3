"""Writes ``predictions.jsonl``: one line for every clip of every test split."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from vidreason.datamodules.atomic_files import naming, write_text
from vidreason.lightning_modules.decisions.predictions import Prediction
from vidreason.run_folder import PREDICTIONS_FILE


class PredictionWriter(L.Callback):
    """Writes the predictions that ``test_step`` returns into the run folder.

    The file is replaced when the test is complete; an interrupted test leaves an earlier file as it is.
    """

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Creates an empty file for the part of this rank."""
        path = _part(trainer, trainer.global_rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path):
            path.write_text("", encoding="utf-8")

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Appends the predictions of a batch."""
        predictions: tuple[Prediction, ...] = outputs["predictions"] if isinstance(outputs, Mapping) else ()
        path = _part(trainer, trainer.global_rank)
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.writelines(prediction.line() for prediction in predictions)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Joins the parts of all ranks; a clip that a sampler gave to two ranks is written once."""
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        lines: dict[tuple[str, str], str] = {}
        parts = [_part(trainer, rank) for rank in range(trainer.world_size)]
        for part in parts:
            # not splitlines(): texts are not ASCII-escaped and may contain U+2028, which it would split at
            for line in part.read_text(encoding="utf-8").split("\n")[:-1]:
                record = json.loads(line)
                lines.setdefault((record["split"], record["video_id"]), line)
        whole = parts[0].with_name(PREDICTIONS_FILE)
        write_text(whole, "".join(line + "\n" for line in lines.values()))
        for part in parts:
            part.unlink()
        rank_zero_info(f"{whole} written ({len(lines)} clips)")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Removes the part of this rank; an earlier ``predictions.jsonl`` stays."""
        _part(trainer, trainer.global_rank).unlink(missing_ok=True)


def _part(trainer: L.Trainer, rank: int) -> Path:
    return Path(trainer.default_root_dir) / f"{PREDICTIONS_FILE}.part{rank}"
