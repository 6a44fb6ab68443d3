"""A stage and its data as a command line describes them, for use without a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning as L
from jsonargparse import Namespace

from vidreason.config.trainer_cli import VideoCLI


class BuiltStage(NamedTuple):
    """A stage and its data without a Trainer, with the accelerator and precision of the YAML."""

    model: L.LightningModule
    data: L.LightningDataModule
    accelerator: str
    precision: Any


def build_stage(command: str, argv: Sequence[str]) -> BuiltStage:
    """Builds the stage and data that a command would use, without a Trainer and without weights."""
    cli = VideoCLI(command, argv, execute=False, with_trainer=False, reads_trainer=False)
    trainer: Namespace = cli.config[command].trainer
    return BuiltStage(cli.model, cli.datamodule, trainer.accelerator, trainer.precision or "32-true")
