"""The logger of a run by name: Lightning's own, and a TensorBoard that shows first what matters."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from vidreason.run_folder import TENSORBOARD_FOLDER

LoggerName = Literal["tensorboard", "csv", "wandb", "mlflow"]
_PACKAGES = ("wandb", "mlflow")
"""Loggers that need the package of their name."""
_PROJECT = "vidreason"

MAIN = "main/"
"""TensorBoard sorts groups by name: this one comes before ``train`` and ``val``."""
WATCHED = "watch/"
"""Behind ``val``: times, memory and other things that are looked at when something is wrong."""
_IN_MAIN = r"train/(reward|rewards/.+/mean|loss)|val/(acc|balanced_acc|nll|nll_scaled|loss)"
_IN_WATCHED = r"(data|memory|rollout_mismatch|timing_s|vision_cache)/.+|train/(step_time|clips_per_s)"
_LEFT_OUT = (
    r"epoch|reward|.+/f1/.+|prefix/.+|val/decode_failures|data/decode_ms|timing_s/(step|reward)|vision_cache/gb|"
    r"train/(policy_loss|num_tokens)|train/rewards/.+/(std|failures)|train/completions/(min|max)_length|"
    r"train/clip_ratio/(low|high|dual)_mean|val/.*brier.*"
)
_PART = r"train/rewards/.+/mean"
_MOST_PARTS = 6
"""Parts of the reward that have a curve."""


class RunTensorBoard(TensorBoardLogger):
    """TensorBoard in ``tb/`` of the run folder, with at most 40 scalars of a fit and none of other commands.

    The scores of a test, which would be single dots, are a table among the texts (``callbacks/result_table.py``).

    Args:
        save_dir: The run folder.
        trains: Whether the command is a fit.
    """

    def __init__(self, save_dir: str | Path, trains: bool) -> None:
        # without a version the folder is tb/ itself and not tb/version_N, so that a resumed run continues in it
        super().__init__(save_dir, name=TENSORBOARD_FOLDER, version="", default_hp_metric=False)
        self.trains = trains
        self._parts: set[str] = set()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs the scalars that are shown, under the names that order them."""
        shown = {name: value for tag, value in metrics.items() if (name := self._shown(tag)) is not None}
        if shown:
            super().log_metrics(shown, step)

    @rank_zero_only
    def log_outcome(self, settings: Mapping[str, object], metrics: Mapping[str, float]) -> None:
        """Writes a row of HParams; its metrics are the last points of curves, which are not logged again."""
        outcome = {name: value for tag, value in metrics.items() if (name := shown_as(tag)) and tag.startswith("val/")}
        writer = self.experiment._get_file_writer()
        for summary in hparams(dict(settings), outcome):
            writer.add_summary(summary)

    def _shown(self, tag: str) -> str | None:
        if not self.trains:
            return None
        if re.fullmatch(_PART, tag):
            if len(self._parts) >= _MOST_PARTS and tag not in self._parts:
                return None
            self._parts.add(tag)
        return shown_as(tag)


def shown_as(tag: str) -> str | None:
    """Returns the name of a logged value in TensorBoard; None if it has no curve there.

    >>> shown_as("train/reward"), shown_as("train/kl"), shown_as("memory/resident"), shown_as("val/f1/fall")
    ('main/train/reward', 'train/kl', 'watch/memory/resident', None)
    """
    if re.fullmatch(_LEFT_OUT, tag):
        return None
    if re.fullmatch(_IN_MAIN, tag):
        return MAIN + tag
    return WATCHED + tag if re.fullmatch(_IN_WATCHED, tag) else tag


def add_logger_argument(parser: LightningArgumentParser) -> None:
    """Adds ``--logger``."""
    parser.add_argument(
        "--logger",
        type=LoggerName | None,
        default=None,
        help="Where curves go: tensorboard (default), csv, wandb or mlflow. trainer.logger takes any class.",
    )


def check_logger(config: Namespace) -> None:
    """Checks that the logger that was chosen can be used.

    Raises:
        ArgumentError: If its package is missing, or ``trainer.logger`` is set as well.
    """
    name = config.logger
    if name is None:
        return
    if config.trainer.logger not in (None, True):
        raise argparse.ArgumentError(
            None, f"--logger {name}: trainer.logger is set in the configuration, too; leave one of them out"
        )
    if name in _PACKAGES and find_spec(name) is None:
        raise argparse.ArgumentError(
            None, f"--logger {name}: the package {name} is missing: pip install {name}, or --logger csv"
        )


def open_loggers(loggers: Sequence[Logger]) -> None:
    """Begins the runs that a command has in wandb and MLflow, before it reads a clip.

    Raises:
        ValueError: If there is no account, or the server refuses or does not answer.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger | MLFlowLogger):
            with _explained("wandb" if isinstance(logger, WandbLogger) else "mlflow"):
                _ = logger.experiment


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what wandb or MLflow raises into an error of one line."""
    if name == "wandb":
        from wandb.errors import Error as Refusal
    else:
        from mlflow.exceptions import MlflowException as Refusal
    try:
        yield
    except Refusal as error:
        hint = "; WANDB_MODE=offline needs no account" * (name == "wandb")
        raise ValueError(f"--logger {name}: {' '.join(str(error).split())}{hint}") from error


def end_wandb(loggers: Sequence[Logger], failed: bool) -> None:
    """Ends the run that a command has in wandb; without, the next stage of a pipeline would be logged into it.

    Args:
        loggers: The loggers of the command.
        failed: Whether the command ended with an exception.
    """
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb  # not always there

        wandb.finish(exit_code=int(failed))


def build_logger(name: LoggerName | None, run_dir: Path, trains: bool) -> Logger:
    """Returns Lightning's logger of that name for a run folder.

    Args:
        name: None is TensorBoard.
        run_dir: The run folder, whose name the run has in wandb and MLflow.
        trains: Whether the command is a fit.
    """
    title = run_dir.as_posix()
    if name == "csv":
        return CSVLogger(run_dir, name="csv")  # version_N for each call: it would remove the curves of an earlier one
    if name == "wandb":
        return WandbLogger(name=title, save_dir=run_dir, project=os.environ.get("WANDB_PROJECT", _PROJECT))
    if name == "mlflow":
        import mlflow  # not always there

        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        with _explained("mlflow"):
            # Lightning's own default is a folder of files, which MLflow refuses by now
            return MLFlowLogger(experiment_name=experiment, run_name=title, tracking_uri=mlflow.get_tracking_uri())
    return RunTensorBoard(run_dir, trains)
