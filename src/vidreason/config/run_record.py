"""What a run leaves behind about itself: command, configuration and task, in its folder and in TensorBoard."""

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
from vidreason.run_folder import COMMAND_FILE, TASK_FILE


class RunRecord(SaveConfigCallback):
    """Writes ``config.yaml``, ``command.txt`` and ``task.yaml`` into the run folder when a run starts.

    Args:
        parser: The parser that made ``config``.
        config: The parsed configuration.
        command_line: What the user typed.
        overwrite: A second run into the same folder replaces the record of the first.
    """

    def __init__(
        self, parser: LightningArgumentParser, config: Namespace, command_line: str, overwrite: bool = True
    ) -> None:
        super().__init__(parser, config, overwrite=overwrite, save_to_log_dir=False)
        self.command_line = command_line
        self._trainer: L.Trainer | None = None
        self._earlier: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Writes the record."""
        self._trainer = trainer
        super().setup(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """The latest metrics: a fit that goes on behind its last validation would not have them."""
        return {"metrics": self._metrics()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them up."""
        self._earlier = state_dict["metrics"]

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Writes both files and the task; a test into the folder of a training run leaves its record alone."""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        command = folder / COMMAND_FILE
        trained_here = command.is_file() and command.read_text(encoding="utf-8").startswith("vidreason fit")
        name = self.command_line.split()[1]
        suffix = f"_{name}" if trained_here and name != "fit" else ""
        write_text(folder / f"command{suffix}.txt", from_the_start(self.command_line) + "\n")
        with atomic_file(folder / f"config{suffix}.yaml") as draft:
            self.parser.save(self.config, draft, skip_unset=False, overwrite=True, multifile=False)
        self._log_text(trainer, (folder / f"config{suffix}.yaml").read_text(encoding="utf-8"))
        data: object = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, VideoDataModule):
            data.task.to_yaml(folder / TASK_FILE)  # the model can be asked where the data set is not

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Puts settings and final metrics beside each other, for TensorBoard's table of runs."""
        self._log_outcome(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As after a fit."""
        self._log_outcome(trainer)

    def _log_text(self, trainer: L.Trainer, config: str) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
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
    """What distinguishes runs: the arguments of model, model family and data, and how long it trains."""
    keys = ("model.", "vlm.", "data.", "seed_everything", "trainer.max_epochs", "trainer.max_steps")
    return {
        key.replace("init_args.", ""): value
        for key, value in vars(config.as_flat()).items()
        if key.startswith(keys) and isinstance(value, str | int | float | bool)
    }


def from_the_start(command_line: str) -> str:
    """The command without the checkpoint that it goes on from."""
    words = [word for word in shlex.split(command_line) if not word.startswith("--ckpt_path=")]
    if "--ckpt_path" in words:
        at = words.index("--ckpt_path")
        del words[at : at + 2]
    return shlex.join(words)
