"""``vidreason fit | validate | test | predict``: one stage from a YAML.

What this adds to Lightning's CLI: one ``vlm:`` section that model and data share, a run folder, configs found in the
installed package, and errors of the user's in one line.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from vidreason import exit_codes
from vidreason.config.command_files import (
    config_files,
    given_batch_size,
    order_files,
    point_at_shipped,
    without_sections,
)
from vidreason.config.errors import explain
from vidreason.config.machine import check_devices, check_machines, describe, say
from vidreason.config.run_record import RunRecord, from_the_start
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.fit.checkpoint_io import AtomicCheckpointIO
from vidreason.lightning_modules.fit.lightning_internals import forward_sigterm
from vidreason.lightning_modules.fit.resume import check_checkpoint_file
from vidreason.lightning_modules.fit.run_checkpoint import CheckpointOptions, RunCheckpoint
from vidreason.lightning_modules.fit.skip_unreadable import TooManyUnreadableError
from vidreason.lightning_modules.fit.stopping import StopOnSignal
from vidreason.lightning_modules.rl.objective import PolicyLoss
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.run_folder import CHECKPOINTS_FOLDER, LAST_CHECKPOINT, TENSORBOARD_FOLDER
from vidreason.signals import StopRequested, check_stop, handle_signals

# A user's loss is a subclass named by class_path; jsonargparse takes dataclasses without subclasses unless told.
set_parsing_settings(subclasses_enabled=[PolicyLoss])

_CKPT_KEYWORDS = ("last", "best", "hpc", "registry")


class StrictParser(LightningArgumentParser):
    """A parser without abbreviations, also for the arguments of classes: the parsers of those are made by its type.

    Attributes:
        stage_file: The file from which ``replaced`` is left out.
        replaced: Sections that the command line gives as a whole. Without this, jsonargparse would merge them into
            those of the stage file, and a setting that the user's file does not name would come from a file of ours.
    """

    stage_file: str | None = None
    replaced: tuple[str, ...] = ()

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)
        self._left_out: tuple[str, ...] = ()

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Namespace:
        """Parses a file."""
        self._left_out = self.replaced if str(path) == self.stage_file else ()
        try:
            parsed: Namespace = super().parse_path(path, *args, **kwargs)
            return parsed
        finally:
            self._left_out = ()

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        """Parses the content of a file."""
        parsed: Namespace = super().parse_string(without_sections(content, self._left_out), *args, **kwargs)
        return parsed


class VideoCLI(LightningCLI):
    """LightningCLI with a shared ``vlm:`` section and a run folder.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        argv: The options behind it.
        execute: False builds data, model and trainer and stops there; no weights are loaded.
        with_trainer: False builds no trainer either.

    Attributes:
        run_dir: The run folder, also ``trainer.default_root_dir``.
    """

    run_dir: Path

    def __init__(self, command: str, argv: Sequence[str], execute: bool = True, with_trainer: bool = True) -> None:
        self.command_line = shlex.join(["vidreason", command, *argv])
        self.execute = execute
        self.with_trainer = with_trainer
        self.argv, self.files = argv, order_files(argv)
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            save_config_callback=RunRecord,
            save_config_kwargs={"command_line": self.command_line},
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
            args=[command, *self.files.arguments],
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Tells the parser which sections of the stage file are replaced."""
        parser = super().init_parser(**kwargs)
        assert isinstance(parser, StrictParser)
        parser.stage_file, parser.replaced = self.files.stage_file, self.files.replaced
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
            "--run_dir", type=str | None, default=None, help="Run folder (default: runs/NAME for NAME.yaml)."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, and settles the run folder; ``sys.argv`` does not matter: pipelines come with arguments of their own.

        Raises:
            ArgumentError: Wrong key or value, two run folders, or a checkpoint that is not there.
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
        default = Path("runs", Path(self.files.stage_file or self.config.subcommand).stem)
        config.run_dir = str(config.run_dir or root or default)
        config.trainer.default_root_dir = None
        self.run_dir = Path(config.run_dir)
        checkpoint = config.ckpt_path
        if checkpoint and checkpoint not in _CKPT_KEYWORDS and not Path(checkpoint).exists():
            raise argparse.ArgumentError(None, f"--ckpt_path {checkpoint}: no such file")
        for section in ("model", "data", "vlm"):
            point_at_shipped(config.get(section))
        if self.config.subcommand == "fit":
            self._say_which_batch_size_counts(config)

    def _say_which_batch_size_counts(self, config: Namespace) -> None:
        """Prints one line where the user sets the batch size of the data and the stage file sets another one."""
        given = given_batch_size(self.argv)
        ours, theirs = (config.get(f"{section}.init_args.batch_size") for section in ("model", "data"))
        if given is not None and ours is not None and ours != theirs:
            say(
                f"batch size in training: model.init_args.batch_size: {ours} counts, not data.init_args.batch_size: "
                f"{theirs} ({given}); set --model.init_args.batch_size to change it"
            )

    def instantiate_classes(self) -> None:
        """Builds data, model and trainer; an error of theirs comes out as they raised it.

        Raises:
            ValueError: A class refused its arguments or its data.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise _cause_of(error) from None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer | None:  # type: ignore[override]
        """Builds the Trainer with its logs and checkpoints in the run folder, unless the YAML puts them elsewhere."""
        if not self.with_trainer:
            return None
        config: Namespace = self.config_init[self.subcommand].trainer
        check_devices(config.accelerator, config.devices)
        kwargs["default_root_dir"] = str(self.run_dir)
        if config.logger is None or config.logger is True:
            kwargs["logger"] = TensorBoardLogger(save_dir=self.run_dir, name=TENSORBOARD_FOLDER, version="")
        listed = [config.callbacks] if isinstance(config.callbacks, L.Callback) else list(config.callbacks or [])
        checkpoints = [callback for callback in listed if isinstance(callback, ModelCheckpoint)]
        if self.subcommand == "fit" and not checkpoints and config.enable_checkpointing is not False:
            checkpoints = [RunCheckpoint(self.config_init[self.subcommand].checkpoint)]
            listed += checkpoints
        for checkpoint in checkpoints:
            checkpoint.dirpath = checkpoint.dirpath or str((self.run_dir / CHECKPOINTS_FOLDER).absolute())
        listed = [StopOnSignal(), *listed] if self.subcommand == "fit" else listed
        trainer: L.Trainer = super().instantiate_trainer(callbacks=listed, **kwargs)
        forward_sigterm(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def before_fit(self) -> None:
        """Refuses the checkpoint of another stage before anything is written."""
        checkpoint = self.config[self.subcommand].ckpt_path
        if checkpoint and checkpoint not in _CKPT_KEYWORDS and isinstance(self.model, VLMModule):
            check_checkpoint_file(checkpoint, self.model)
            self.model.checkpoint_to_resume = Path(checkpoint)

    def _run_subcommand(self, subcommand: str) -> None:
        if not self.execute:
            return
        check_machines(self.trainer)
        say(f"run folder: {self.run_dir}")
        if isinstance(self.model, VLMModule):
            say(f"strategy: {describe(self.trainer, self.model, trains=subcommand == 'fit')}")
        try:
            with handle_signals():
                super()._run_subcommand(subcommand)
                check_stop()  # the fit was at its end; what comes behind it (a pipeline's next stage) need not begin
        except SystemExit as stop:
            # Lightning shuts down in order, then exits with 1 from inside its `except KeyboardInterrupt`
            if isinstance(stop.__context__, KeyboardInterrupt):
                say(self._how_to_resume())
                raise KeyboardInterrupt from None
            raise
        except (StopRequested, TooManyUnreadableError):
            say(self._how_to_resume())
            raise

    def _how_to_resume(self) -> str:
        if self.subcommand != "fit":
            return f"interrupted; start again with: {self.command_line}"
        folders = [
            Path(c.dirpath) for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath
        ]
        saved = [folder / LAST_CHECKPOINT for folder in folders if (folder / LAST_CHECKPOINT).is_file()]
        if not saved:
            return f"interrupted before the first checkpoint; start again with: {self.command_line}"
        path = saved[0]
        if path.is_relative_to(Path.cwd()):
            path = path.relative_to(Path.cwd())
        again = f"{from_the_start(self.command_line)} --ckpt_path {shlex.quote(str(path))}"
        return f"interrupted; resume with: {again}"


def run(command: str, argv: Sequence[str]) -> int:
    """Runs one of Lightning's subcommands.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        argv: The options behind it.

    Returns:
        Exit status: 0, or 2 where the command line or a YAML is wrong.

    Raises:
        ValueError: The run itself cannot go on; the message says why.
        KeyboardInterrupt: After an orderly shutdown.
    """
    try:
        with warnings.catch_warnings():
            # Lightning calls the parser by a name that is going away; nothing a user could do about it
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli")
            VideoCLI(command, argv)
    except (argparse.ArgumentError, OmegaConfBaseException) as error:
        print(f"error: {explain(str(error), config_files(argv), argv)}", file=sys.stderr)
        return exit_codes.USAGE
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    return exit_codes.OK


def build(command: str, argv: Sequence[str]) -> VideoCLI:
    """Parses and instantiates everything a command would use, without running it or loading weights."""
    return VideoCLI(command, argv, execute=False)


class BuiltStage(NamedTuple):
    """A stage and its data without a Trainer, and where the YAML lets them run."""

    model: L.LightningModule
    data: L.LightningDataModule
    accelerator: str
    precision: Any


def build_stage(command: str, argv: Sequence[str]) -> BuiltStage:
    """Builds the stage and the data that a command would use, without a Trainer and without weights."""
    cli = VideoCLI(command, argv, execute=False, with_trainer=False)
    trainer: Namespace = cli.config[command].trainer
    return BuiltStage(cli.model, cli.datamodule, trainer.accelerator, trainer.precision or "32-true")


def _cause_of(error: ValueError) -> ValueError:
    """Finds what the parser wrapped in "does not validate against any of the Union subtypes"."""
    cause = error.__cause__
    return _cause_of(cause) if isinstance(cause, ValueError) else error
