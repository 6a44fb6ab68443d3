"""The record of a run: command, configuration and task, in its folder and in TensorBoard."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from vidreason.datamodules.atomic_files import atomic_file, write_text
from vidreason.datamodules.base import VideoDataModule
from vidreason.run_folder import COMMAND_FILE, CONFIG_FILE, TASK_FILE, named_after


class RunRecord(SaveConfigCallback):
    """Writes ``config.yaml``, ``command.txt`` and ``task.yaml`` into the run folder when a run starts.

    Args:
        parser: The parser that produced ``config``.
        config: The parsed configuration.
        command_line: The command as the user typed it.
        overwrite: Whether a second run into the same folder replaces the record of the first.
    """

    def __init__(
        self, parser: LightningArgumentParser, config: Namespace, command_line: str, overwrite: bool = True
    ) -> None:
        super().__init__(parser, config, overwrite=overwrite, save_to_log_dir=False)
        self.command_line = command_line
        self._trainer: L.Trainer | None = None
        self._earlier: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Writes the record when the run starts."""
        self._trainer = trainer
        super().setup(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """Returns the latest metrics: a fit that resumes after its last validation would not log them again."""
        return {"metrics": self._metrics()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the metrics."""
        self._earlier = state_dict["metrics"]

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Writes command, config and task; a test in the folder of a training run gets files of its own."""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        command = folder / COMMAND_FILE
        trained_here = command.is_file() and command.read_text(encoding="utf-8").startswith("vidreason fit")
        name = self.command_line.split()[1]  # fit, validate, test or predict
        config = folder / CONFIG_FILE
        if trained_here and name != "fit":
            command, config = (path.with_name(named_after(path.name, name)) for path in (command, config))
        write_text(command, from_the_start(self.command_line) + "\n")
        with atomic_file(config) as draft:
            self.parser.save(self.config, draft, skip_unset=False, overwrite=True, multifile=False)
        self._log_text(trainer, config.read_text(encoding="utf-8"))
        data: object = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, VideoDataModule):
            data.task.to_yaml(folder / TASK_FILE)  # for using the model without the data set

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs settings and final metrics to TensorBoard's table of runs (HPARAMS)."""
        self._log_outcome(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs settings and test metrics to TensorBoard's table of runs (HPARAMS)."""
        self._log_outcome(trainer)

    def _log_text(self, trainer: L.Trainer, config: str) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # four spaces make a Markdown code block, in which TensorBoard keeps line breaks
                quoted = "\n".join(f"    {line}" for line in [self.command_line, "", *config.splitlines()])
                logger.experiment.add_text("config", quoted, trainer.global_step)

    def _metrics(self) -> dict[str, float]:
        found = {} if self._trainer is None else self._trainer.callback_metrics
        return self._earlier | {name: float(value) for name, value in found.items()}

    def _log_outcome(self, trainer: L.Trainer) -> None:
        metrics = self._metrics()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(_settings(self.config), metrics or None, trainer.global_step)


def _settings(config: Namespace) -> dict[str, Any]:
    """Returns the settings that distinguish runs: arguments of model, VLM and data, and the length of the fit."""
    keys = ("model.", "vlm.", "data.", "seed_everything", "trainer.max_epochs", "trainer.max_steps")
    return {
        key.replace("init_args.", ""): value
        for key, value in vars(config.as_flat()).items()
        if key.startswith(keys) and isinstance(value, str | int | float | bool)
    }


def from_the_start(command_line: str) -> str:
    """Returns a command line without its ``--ckpt_path``."""
    words = [word for word in shlex.split(command_line) if not word.startswith("--ckpt_path=")]
    if "--ckpt_path" in words:
        at = words.index("--ckpt_path")
        del words[at : at + 2]
    return shlex.join(words)
