"""``vidreason fit | validate | test | predict``: one stage from a YAML.

It adds to Lightning's CLI a ``vlm:`` section that model and data share, a run folder, configs of the installed package,
and one-line errors for mistakes of the user.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from vidreason import exit_codes
from vidreason.config.command_files import config_files, order_files, point_at_shipped
from vidreason.config.errors import cause_of, explain_call, missing_package
from vidreason.config.fit_start import (
    CKPT_KEYWORDS,
    add_fit_arguments,
    end_fit,
    how_to_resume,
    prepare_fit,
    say_which_batch_size_counts,
    telling_how_to_go_on,
)
from vidreason.config.loggers import add_logger_argument, build_logger, check_logger, end_wandb, open_loggers
from vidreason.config.machine import check_devices, check_machines, describe, say
from vidreason.config.out_of_memory import explain_out_of_memory
from vidreason.config.run_record import RunRecord, saved_config
from vidreason.config.scale import find_profile
from vidreason.config.strict_parser import StrictParser
from vidreason.lightning_internals import forward_sigterm
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.fit.checkpoint_io import AtomicCheckpointIO, read_checkpoint
from vidreason.lightning_modules.fit.run_checkpoint import CheckpointOptions, RunCheckpoint
from vidreason.lightning_modules.fit.stopping import StopOnSignal
from vidreason.lightning_modules.rl.objective import PolicyLoss
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.weights.lineage import describe_weights
from vidreason.run_folder import CHECKPOINTS_FOLDER
from vidreason.run_lock import lock_run_folder
from vidreason.signals import check_stop, handle_signals

# A user's loss is a subclass named by class_path; by default jsonargparse accepts no subclasses of a dataclass.
set_parsing_settings(subclasses_enabled=[PolicyLoss])

_SCRATCH_VARIABLE = "VIDREASON_SCRATCH"


class VideoCLI(LightningCLI):
    """LightningCLI with a shared ``vlm:`` section and a run folder.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        argv: The options after the command.
        execute: Whether to run the command; False only builds data, model and trainer, without loading weights.
        with_trainer: Whether to build a trainer.
        reads_trainer: Whether the stage file's trainer is read; False reads only its accelerator and precision.

    Attributes:
        run_dir: The run folder, also ``trainer.default_root_dir``.
    """

    run_dir: Path
    _scratch: str | None = None

    def __init__(
        self,
        command: str,
        argv: Sequence[str],
        execute: bool = True,
        with_trainer: bool = True,
        reads_trainer: bool = True,
    ) -> None:
        self.command, self.execute = command, execute
        self.command_line = shlex.join(["vidreason", command, *argv])
        self.with_trainer, self.reads_trainer = with_trainer, reads_trainer
        self.argv, self.files = argv, order_files(argv)
        config_files(argv)  # a mistake in a YAML file is found before the parser meets it
        self.profile, profile = find_profile(self.files)
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            save_config_callback=RunRecord,
            save_config_kwargs={
                "command_line": self.command_line,
                "saved": lambda: self.saved,
                "resumes": lambda: bool(self.config_init[command].ckpt_path),
            },
            seed_everything_default=0,
            parser_kwargs={
                "prog": "vidreason",
                "description": "Train or run one stage.",
                "parser_mode": "omegaconf",
                "exit_on_error": False,
            },
            parser_class=StrictParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=[command, *profile, *self.files.arguments],
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # a static method in LightningCLI
        """Returns the command to run, so that no time is spent on the parsers of the others."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Returns the parser, which knows the replaced sections of the stage file."""
        parser = super().init_parser(**kwargs)
        assert isinstance(parser, StrictParser)
        parser.stage_file, parser.replaced = self.files.stage_file, self.files.replaced
        if not self.reads_trainer:
            parser.leave_out_trainer()
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds ``--vlm``, shared by model and data, and ``--run_dir``."""
        parser.add_subclass_arguments(
            VLM, "vlm", required=True, help="The vision-language model: data and model get the same object."
        )
        parser.link_arguments("vlm", "model.init_args.vlm", apply_on="instantiate")
        parser.link_arguments("vlm", "data.init_args.encoder", apply_on="instantiate")
        parser.add_argument(
            "--checkpoint",
            type=CheckpointOptions,
            default=CheckpointOptions(),
            help="Which checkpoints a fit leaves in RUN/checkpoints.",
        )
        parser.add_argument(
            "--profile",
            type=str | None,
            default=None,
            help="Part of the model's profile (vlm.scale) whose settings apply below all others; null takes none.",
        )
        parser.add_argument(
            "--run_dir", type=str | None, default=None, help="Run folder (default: runs/NAME for NAME.yaml)."
        )
        add_logger_argument(parser)
        if self.command == "fit":
            add_fit_arguments(parser)

    def _parse_ckpt_path(self) -> None:
        """Does nothing: LightningCLI would read hyperparameters, which the checkpoints here do not have."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses ``args`` (never ``sys.argv``, because pipelines pass their own) and determines the run folder.

        Raises:
            ArgumentError: If a key or value is wrong, there are two run folders, or the checkpoint does not exist.
        """
        self.config = parser.parse_args(args)
        config: Namespace = self.config[self.config.subcommand]
        root = config.trainer.default_root_dir
        if config.run_dir and root and Path(config.run_dir) != Path(root):
            raise argparse.ArgumentError(
                None,
                f"run_dir is {config.run_dir} but trainer.default_root_dir is {root}: they are the same folder, give "
                "--run_dir alone",
            )
        config.run_dir = config.run_dir or root or f"runs/{Path(self.files.stage_file or self.config.subcommand).stem}"
        # left out of config.yaml, which could not be used with another --run_dir otherwise
        config.trainer.default_root_dir = None
        self.run_dir = Path(config.run_dir)
        if config.trainer.fast_dev_run and self.execute:
            self.run_dir = self._scratch_folder()
            say(f"fast_dev_run: files go to a temporary folder, nothing in {config.run_dir} changes")
        # left out of config.yaml: they apply to this call
        self.force, self.reset_optimizer = (bool(config.pop(key, False)) for key in ("force", "reset_optimizer"))
        if self.reset_optimizer and not config.ckpt_path:
            raise argparse.ArgumentError(
                None, "--reset_optimizer: give the checkpoint whose weights to take: --ckpt_path"
            )
        checkpoint = config.ckpt_path
        if checkpoint and checkpoint not in CKPT_KEYWORDS and not Path(checkpoint).exists():
            raise argparse.ArgumentError(None, f"--ckpt_path {checkpoint}: no such file")
        check_logger(config)
        for section in ("model", "data", "vlm"):
            point_at_shipped(config.get(section))
        if self.config.subcommand == "fit":
            say_which_batch_size_counts(config, self.argv)

    def _scratch_folder(self) -> Path:
        """Returns a folder that is removed after the run, the same for all processes that this one starts."""
        if _SCRATCH_VARIABLE not in os.environ:
            os.environ[_SCRATCH_VARIABLE] = self._scratch = tempfile.mkdtemp(prefix="vidreason_")
        return Path(os.environ[_SCRATCH_VARIABLE])

    def instantiate_classes(self) -> None:
        """Builds data, model and trainer; their errors are raised without the parser's wrapping.

        Raises:
            ValueError: If a class rejects its arguments or its data.
        """
        try:
            super().instantiate_classes()
        except (ValueError, ModuleNotFoundError) as error:
            raise missing_package(str(error)) or cause_of(error) from None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer | None:  # type: ignore[override]
        """Builds the Trainer with logs and checkpoints in the run folder, unless the YAML sets other places."""
        if not self.with_trainer:
            return None
        config: Namespace = self.config_init[self.subcommand].trainer
        check_devices(config.accelerator, config.devices)
        kwargs["default_root_dir"] = str(self.run_dir)
        if config.logger is None or config.logger is True:
            name = self.config_init[self.subcommand].logger
            # some loggers open their store when they are built, which a check has no use for
            kwargs["logger"] = self.execute and build_logger(name, self.run_dir, trains=self.subcommand == "fit")
        listed = [config.callbacks] if isinstance(config.callbacks, L.Callback) else list(config.callbacks or [])
        checkpoints = [callback for callback in listed if isinstance(callback, ModelCheckpoint)]
        if self.subcommand == "fit" and not checkpoints and config.enable_checkpointing is not False:
            checkpoints = [RunCheckpoint(self.config_init[self.subcommand].checkpoint)]
            listed += checkpoints
        for checkpoint in checkpoints:
            checkpoint.dirpath = checkpoint.dirpath or str((self.run_dir / CHECKPOINTS_FOLDER).absolute())
        listed = [StopOnSignal(), *listed] if self.subcommand == "fit" else listed
        if config.enable_progress_bar is False:  # which Lightning refuses beside the bar of the shipped YAML
            listed = [callback for callback in listed if not isinstance(callback, ProgressBar)]
        trainer: L.Trainer = super().instantiate_trainer(callbacks=listed, **kwargs)
        forward_sigterm(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        if not self.execute:
            return
        check_machines(self.trainer)
        try:
            with lock_run_folder(self.run_dir) if self.trainer.is_global_zero else nullcontext():
                fit = None
                if subcommand == "fit":
                    fit = prepare_fit(self, self.run_dir, self.saved, self.force, self.reset_optimizer)
                if fit is None or fit.runs:
                    self._run_locked(subcommand)
                if fit is not None and fit.runs:
                    end_fit(self, self.run_dir, fit)
        finally:
            end_wandb(self.trainer.loggers, failed=sys.exc_info()[0] is not None)
            if self._scratch is not None:
                del os.environ[_SCRATCH_VARIABLE]
                shutil.rmtree(self._scratch, ignore_errors=True)

    def _run_locked(self, subcommand: str) -> None:
        """Runs a command whose run folder no other process writes to."""
        say(f"run folder: {self.run_dir}")
        checkpoint = self.config_init[subcommand].ckpt_path
        if subcommand != "fit" and checkpoint and checkpoint not in CKPT_KEYWORDS:
            read_checkpoint(checkpoint)  # refuses what is none by name
        for line in self.settings():
            say(line)
        if isinstance(self.model, VLMModule):
            say(f"strategy: {describe(self.trainer, self.model, trains=subcommand == 'fit')}")
            weights = getattr(self.model, "calibrator_path", None) or self.model.adapter_path
            say(f"weights: {describe_weights(weights) if subcommand == 'fit' or not checkpoint else checkpoint}")
        open_loggers(self.trainer.loggers)
        going_on = telling_how_to_go_on(lambda: how_to_resume(self.trainer, self.subcommand, self.command_line))
        with going_on, handle_signals(), explain_out_of_memory(self.model, self.argv):
            super()._run_subcommand(subcommand)
            check_stop()  # a signal at the very end of a fit: the next stage of a pipeline must not begin

    @cached_property
    def saved(self) -> dict[str, Any]:
        """The configuration as ``config.yaml`` shows it; making it takes as long as parsing."""
        return saved_config(self._parser(self.subcommand), self.config[self.subcommand])

    def settings(self) -> list[str]:
        """Returns lines with the settings of the model's profile as they hold in this run."""
        return [] if self.profile is None else self.profile.describe(self.config[self.subcommand])


def run(command: str, argv: Sequence[str]) -> int:
    """Runs one of Lightning's subcommands.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        argv: The options after the command.

    Returns:
        Exit status: 0, or 2 if the command line or a YAML file is wrong.

    Raises:
        ValueError: If the run itself cannot continue; the message says why.
        KeyboardInterrupt: After Ctrl-C or SIGTERM and an orderly shutdown.
    """
    try:
        with warnings.catch_warnings():
            # Lightning uses a deprecated name of the parser, about which a user can do nothing
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli")
            VideoCLI(command, argv)
    except (argparse.ArgumentError, OmegaConfBaseException) as error:
        print(f"error: {explain_call(str(error), argv)}", file=sys.stderr)
        return exit_codes.USAGE
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    return exit_codes.OK


def build(command: str, argv: Sequence[str]) -> VideoCLI:
    """Builds everything that a command would use, without running it or loading weights."""
    return VideoCLI(command, argv, execute=False)
