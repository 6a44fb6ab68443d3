"""The commands that a plan is made for: one stage, or all stages of a pipeline, built without weights."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from omegaconf.errors import OmegaConfBaseException

from vidreason.config.command_files import config_files
from vidreason.config.errors import explain
from vidreason.config.quiet import quietly
from vidreason.config.trainer_cli import VideoCLI
from vidreason.datamodules.base import VideoDataModule
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.fit.schedule import count_steps
from vidreason.pipelines.call import read_call
from vidreason.pipelines.inputs import StageInputs
from vidreason.run_folder import RunState

_HALF = {"bf16": torch.bfloat16, "16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Dtypes that the trainer's precision sets for a model."""

    name: str
    autocast: torch.dtype | None
    """Dtype of mixed precision; None is off."""
    converted: torch.dtype | None
    """Dtype that all weights are converted to; None leaves them."""


@dataclass(frozen=True)
class PlannedStage:
    """A command that is built but not run."""

    name: str
    command: str
    stage: VLMModule
    data: VideoDataModule
    trainer: Namespace
    """The trainer section."""
    vlm: str
    """The section of the model as text, equal for equal models."""

    @property
    def precision(self) -> Precision:
        """The precision of the trainer section."""
        name = str(self.trainer.precision or "32-true")
        kind, _, how = name.partition("-")
        half = _HALF.get(kind)
        return Precision(name, half if how == "mixed" else None, half if how == "true" else None)

    @property
    def batch(self) -> int:
        """Clips of an optimizer step."""
        return self.stage.batch_size or self.data.batch_size

    def steps(self, clips: int) -> int:
        """Returns the number of optimizer steps of a fit on ``clips`` training clips; 0 of other commands."""
        if self.command != "fit":
            return 0
        with quietly():
            trainer = L.Trainer(
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                max_steps=self.trainer.max_steps,
                max_epochs=self.trainer.max_epochs,
                limit_train_batches=self.trainer.limit_train_batches,
            )
        return count_steps(trainer, math.ceil(clips / self.batch), self.stage.updates.per_batch)

    def validations(self, clips: int) -> int:
        """Returns how often a fit validates."""
        batches = math.ceil(self.steps(clips) / self.stage.updates.per_batch)
        every, epochs = self.trainer.val_check_interval or 1.0, self.trainer.check_val_every_n_epoch
        if epochs is None:
            return batches // int(every)
        passes = batches / math.ceil(clips / self.batch)
        each = 1 if isinstance(every, int) else max(1, round(1 / every))
        return int(passes // epochs) * each


def planned_commands(
    configs: Sequence[str], pipeline: str | None, command: str, rest: Sequence[str]
) -> dict[str, list[str]]:
    """Returns command lines without ``vidreason``, by the name of the stage.

    Args:
        configs: Stage file and its overlays; empty for a pipeline.
        pipeline: Pipeline file; None for a stage.
        command: ``fit``, ``validate``, ``test`` or ``predict``, for a stage.
        rest: Further options, those of the command or of ``vidreason pipeline``.
    """
    if pipeline is None:
        files = [word for config in configs for word in ("--config", config)]
        return {Path(configs[0]).stem: [command, *files, *rest]}
    folder = "runs/plan"
    call = read_call(["--config", pipeline, "--run_dir", folder, *rest])
    inputs = StageInputs(call.spec, Path(folder), RunState(call.spec.name))
    # A plan is for a base whose texts are language, where a pipeline makes more than without them.
    stages = [stage for stage in call.spec.stages if stage.when is None or stage.when.language]
    return {stage.name: inputs.command_line(stage, Path(folder, stage.name)) for stage in stages}


def build_planned(name: str, argv: Sequence[str]) -> PlannedStage:
    """Builds stage and data of a command line without a trainer and without weights.

    Raises:
        ValueError: If an option or file has a mistake, or stage or data are not of this package.
    """
    command, options = argv[0], argv[1:]
    try:
        with quietly():
            cli = VideoCLI(command, options, execute=False, with_trainer=False)
    except (argparse.ArgumentError, OmegaConfBaseException) as error:
        raise ValueError(explain(str(error), config_files(options), options)) from error
    stage, data = cli.model, cli.datamodule
    if not isinstance(stage, VLMModule) or not isinstance(data, VideoDataModule):
        raise ValueError(f"{name}: a plan needs a VLMModule and a VideoDataModule, got {type(stage)} and {type(data)}")
    if command == "fit" and type(stage).training_step is L.LightningModule.training_step:
        raise ValueError(f"{name}: {type(stage).__name__} trains nothing: give --command test or --command predict")
    section: Any = cli.config[command]
    with quietly():
        data.prepare_data()
        data.setup("")
    return PlannedStage(name, command, stage, data, section.trainer, str(section.vlm))
