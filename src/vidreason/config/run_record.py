"""The record of a run: command, configuration and task, in its folder and in TensorBoard."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from vidreason.config.command_files import parse_yaml
from vidreason.config.loggers import RunTensorBoard
from vidreason.datamodules.atomic_files import write_text
from vidreason.datamodules.base import VideoDataModule
from vidreason.run_folder import COMMAND_FILE, CONFIG_FILE, FINISHED_FILE, TASK_FILE, named_after

_FILE_SUFFIXES = (".yaml", ".yml", ".csv", ".tsv", ".json", ".jsonl")
_SECTION_FILES = ("data", "vlm", "model", "trainer")
_OF_ONE_RUN = ("adapter_path", "calibrator_path", "traces_file", "fold_traces", "data_dir", "default_root_dir")
"""Settings with the paths of one run."""
_PATH_KEYS = ("path", "folder", "root", "manifest", "task", "adapter_path", "calibrator_path", "traces_file")

_MADE_FOLDERS = (".vision_cache.folder", ".frames.cache", ".data_dir")
"""Ends of the keys of folders that a run makes."""


class RunRecord(SaveConfigCallback):
    """Writes ``config.yaml``, ``command.txt`` and ``task.yaml`` into the run folder when a run starts.

    Args:
        parser: The parser that produced ``config``.
        config: The parsed configuration.
        command_line: The command as the user typed it.
        saved: Returns the configuration as ``config.yaml`` shows it (``saved_config``).
        resumes: Returns whether the fit goes on from a checkpoint.
        overwrite: Whether a second run into the same folder replaces the record of the first.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        command_line: str,
        saved: Callable[[], dict[str, Any]],
        resumes: Callable[[], bool] = lambda: False,
        overwrite: bool = True,
    ) -> None:
        super().__init__(parser, config, overwrite=overwrite, save_to_log_dir=False)
        self.command_line, self.saved, self.resumes = command_line, saved, resumes
        self._trainer: L.Trainer | None = None
        self._earlier: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Writes the record when the run starts; a fit that resumes may still be refused and waits."""
        self._trainer = trainer
        if stage != "fit" or not self.resumes():
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the record of a fit that resumes."""
        if not self.already_saved:
            super().setup(trainer, pl_module, "fit")

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
        if name == "fit":
            (folder / FINISHED_FILE).unlink(missing_ok=True)
        content, line = self.saved(), self.command_line
        if name == "fit":  # a test with the config of a resumed fit would load this checkpoint over its weights
            content, line = content | {"ckpt_path": None}, from_the_start(line)
        write_text(command, line + "\n")
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        write_text(config, text)
        self._log_text(trainer, text)
        data: object = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, VideoDataModule):
            data.task.to_yaml(folder / TASK_FILE)  # for using the model without the data set

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs settings and final validation to TensorBoard's table of runs (HPARAMS)."""
        for logger in trainer.loggers:
            if isinstance(logger, RunTensorBoard):
                logger.log_outcome(given_settings(self.command_line, self.config), self._metrics())

    def _log_text(self, trainer: L.Trainer, config: str) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # four spaces make a Markdown code block, in which TensorBoard keeps line breaks
                quoted = "\n".join(f"    {line}" for line in [self.command_line, "", *config.splitlines()])
                logger.experiment.add_text("config", quoted, trainer.global_step)
            else:
                logger.log_hyperparams(given_settings(self.command_line, self.config))

    def _metrics(self) -> dict[str, float]:
        found = {} if self._trainer is None else self._trainer.callback_metrics
        return self._earlier | {name: float(value) for name, value in found.items()}


def saved_config(parser: LightningArgumentParser, config: Namespace) -> dict[str, Any]:
    """Returns a parsed configuration as plain values, with absolute paths, so that it can be used from any folder."""
    # parsing has validated the values; a second time takes as long as the rest of this function
    content: dict[str, Any] = parse_yaml(parser.dump(config, skip_unset=False, skip_validation=True))
    return {key: value if key == "run_dir" else _absolute(value, key) for key, value in content.items()}


def _absolute(value: Any, key: str) -> Any:
    """Returns a value with the names of files and folders that exist or will be made absolute, at any depth.

    Args:
        value: The value.
        key: Its dotted key.
    """
    if isinstance(value, dict):
        return {name: _absolute(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list):
        return [_absolute(item, key) for item in value]
    if not isinstance(value, str) or not value:
        return value
    # A word such as "train" is the name of a split, also where the current folder has a folder of that name.
    may_be_path = "/" in value or value.endswith(_FILE_SUFFIXES) or key.rpartition(".")[2] in _PATH_KEYS
    is_path = key.endswith(_MADE_FOLDERS) or (may_be_path and Path(value).exists())
    return str(Path(value).absolute()) if is_path and not value.startswith("~") else value


def given_settings(command_line: str, config: Namespace) -> dict[str, str | int | float | bool]:
    """Returns the settings that the command line gives, without paths of the run, and the seed.

    Settings that no command line changes are the same for all runs, as a column of a table of runs would show.
    """
    values, found = vars(config.as_flat()), dict[str, str | int | float | bool]()
    for key, given in _options(command_line):
        value = values.get(key, given)
        where = key.rpartition(".")[2]
        if key in _SECTION_FILES:
            found[key] = given
        elif "." in key and where not in _OF_ONE_RUN and isinstance(value, str | int | float | bool):
            found[key.replace("init_args.", "")] = value
    return found | {"seed_everything": values.get("seed_everything", 0)}


def _options(command_line: str) -> list[tuple[str, str]]:
    """Returns the options of a command line with their values, which may follow a space or an equals sign."""
    words, found = shlex.split(command_line), list[tuple[str, str]]()
    for place, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            found.append((name, value if equals or place + 1 == len(words) else words[place + 1]))
    return found


def from_the_start(command_line: str) -> str:
    """Returns a command line without ``--ckpt_path``, ``--force`` and ``--reset_optimizer``, which apply once."""
    once = ("--force", "--reset_optimizer")
    words = [w for w in shlex.split(command_line) if not w.startswith("--ckpt_path=") and w not in once]
    if "--ckpt_path" in words:
        at = words.index("--ckpt_path")
        del words[at : at + 2]
    return shlex.join(words)
