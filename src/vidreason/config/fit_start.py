"""The beginning and the end of ``vidreason fit``: from the content of its run folder and the checkpoint to resume."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from vidreason.config.command_files import given_batch_size
from vidreason.config.fit_folder import begin_fit, clear_folder, mark_finished
from vidreason.config.machine import say
from vidreason.config.run_record import from_the_start
from vidreason.lightning_internals import batches_done
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.fit.resume import check_checkpoint_file
from vidreason.lightning_modules.fit.skip_unreadable import TooManyUnreadableError
from vidreason.run_folder import LAST_CHECKPOINT
from vidreason.signals import StopRequested

CKPT_KEYWORDS = ("last", "best", "hpc", "registry")
"""Values of ``Trainer(ckpt_path=...)`` that are not paths."""


class PreparedFit(NamedTuple):
    """A fit that is about to begin."""

    runs: bool
    """False if there is nothing to do."""
    batches: int | None = None
    """Finished batches of the checkpoint that is resumed."""


def add_fit_arguments(parser: LightningArgumentParser) -> None:
    """Adds ``--force`` and ``--reset_optimizer``, which apply to one call and are not saved."""
    parser.add_argument(
        "--force",
        action="store_true",
        help="Start again where the run folder holds another fit, whose files move to NAME.old.",
    )
    parser.add_argument(
        "--reset_optimizer",
        action="store_true",
        help="Take only the weights of --ckpt_path: optimizer, schedule and clips begin anew.",
    )


def say_which_batch_size_counts(config: Namespace, argv: Sequence[str]) -> None:
    """Warns in one line if the user sets the batch size of the data, which the stage overrides with its own."""
    given = given_batch_size(argv)
    ours, theirs = (config.get(f"{section}.init_args.batch_size") for section in ("model", "data"))
    if given is not None and ours is not None and ours != theirs:
        say(
            f"batch size in training: model.init_args.batch_size: {ours} counts, not data.init_args.batch_size: "
            f"{theirs} ({given}); set --model.init_args.batch_size to change it"
        )


def prepare_fit(
    cli: LightningCLI, run_dir: Path, config: Mapping[str, Any], force: bool, reset_optimizer: bool
) -> PreparedFit:
    """Decides from the content of the run folder whether a fit starts, is resumed, or has nothing to do.

    Args:
        cli: The command, whose ``ckpt_path`` is set if an unfinished fit is resumed.
        run_dir: Its run folder.
        config: The configuration as ``config.yaml`` shows it.
        force: Whether to start again where the folder holds another fit.
        reset_optimizer: Whether to take only the weights of the checkpoint.

    Raises:
        ValueError: If the folder holds another fit, or the checkpoint to resume belongs to another stage.
    """
    init = cli.config_init["fit"]
    given = init.ckpt_path if init.ckpt_path not in CKPT_KEYWORDS else None
    if force:
        if cli.trainer.is_global_zero:
            clear_folder(run_dir, config)
    else:
        beginning = begin_fit(run_dir, config, given, reset_optimizer)
        if beginning.action == "nothing":
            say(f"{run_dir}: this fit has finished: nothing to do (--force starts it again)")
            return PreparedFit(runs=False)
        if beginning.checkpoint is not None and given is None:
            init.ckpt_path = given = str(beginning.checkpoint)
            say(f"{run_dir}: holds this fit, unfinished; resuming from {given}")
    batches = None
    if given is not None and isinstance(cli.model, VLMModule):
        saved = check_checkpoint_file(given, cli.model)
        if reset_optimizer:
            cli.model.weights_to_load = Path(given)
        else:
            cli.model.checkpoint_to_resume, batches = Path(given), saved["progress"]["batches"]
    if reset_optimizer:
        init.ckpt_path = None
    return PreparedFit(True, batches)


def end_fit(cli: LightningCLI, run_dir: Path, fit: PreparedFit) -> None:
    """Records that a fit has finished, and says so if its checkpoint left nothing to train."""
    trainer = cli.trainer
    if fit.batches is not None and fit.batches == batches_done(trainer):
        say(f"nothing to do: the checkpoint has all {fit.batches} batches; raise trainer.max_epochs or max_steps")
    if trainer.is_global_zero:
        mark_finished(run_dir, trainer.global_step, trainer.current_epoch)


@contextmanager
def telling_how_to_go_on(message: Callable[[], str]) -> Iterator[None]:
    """Prints a message if the block is stopped by a signal or by unreadable clips, and raises what stopped it.

    Args:
        message: Returns the message.
    """
    try:
        yield
    except (StopRequested, TooManyUnreadableError):
        say(message())
        raise
    except (SystemExit, RuntimeError) as error:
        # Lightning calls exit(1) after a KeyboardInterrupt, and its teardown fails if workers were being started.
        stop = error.__context__
        if not isinstance(stop, KeyboardInterrupt if isinstance(error, SystemExit) else StopRequested):
            raise
        if isinstance(error, RuntimeError):
            say(f"after the signal: {error}")
        say(message())
        raise KeyboardInterrupt from None


def how_to_resume(trainer: L.Trainer, command: str | None, command_line: str) -> str:
    """Returns the message with the command that resumes or repeats the run."""
    if command != "fit":
        return f"interrupted; start again with: {command_line}"
    folders = [Path(c.dirpath) for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    saved = [folder / LAST_CHECKPOINT for folder in folders if (folder / LAST_CHECKPOINT).is_file()]
    if not saved:
        again = command_line.replace(" --force", "")
        return f"interrupted before the first checkpoint; start again with: {again}"
    path = saved[0]
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    again = f"{from_the_start(command_line)} --ckpt_path {shlex.quote(str(path))}"
    return f"interrupted; resume with: {again}"
