"""How pipelines reach the ordinary commands: in this process, where starting another costs seconds of imports."""

from __future__ import annotations

import argparse
import gc
import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from vidreason import exit_codes
from vidreason.config.quiet import quietly

if TYPE_CHECKING:
    from vidreason.config.trainer_cli import VideoCLI


@dataclass(frozen=True)
class Commands:
    """The ordinary commands, as arguments behind ``vidreason``; tests put their own in place."""

    run: Callable[[list[str]], int]
    """Runs a command and returns its exit status"""
    check: Callable[[list[str]], str | None]
    """Parses and builds what a command would use, without weights; returns what is wrong with it, in one line"""
    train_clips: Callable[[list[str]], int | None]
    """Counts the training clips that a command reads; None where the data module cannot tell"""


class Builds:
    """Commands as they are built, without weights: once each, since every question needs one."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], VideoCLI] = {}

    def __call__(self, argv: list[str]) -> VideoCLI:
        """Builds a command, or returns what was built for the same arguments."""
        from vidreason.config import trainer_cli

        key = tuple(argv)
        if key not in self._known:
            with quietly():
                self._known[key] = trainer_cli.build(argv[0], argv[1:])
        return self._known[key]


def trainer_commands() -> Commands:
    """The real ones."""
    built = Builds()
    return Commands(partial(run_stage, built), partial(check_stage, built), partial(count_train_clips, built))


def run_stage(built: Builds, argv: list[str]) -> int:
    """Runs ``fit``, ``predict`` or ``test``.

    Args:
        built: Where commands are built.
        argv: ``fit --config ...`` as the shell would give it.

    Returns:
        Exit status; ``exit_codes.UNPARSED`` where the stage gave up because no completion parses.

    Raises:
        ValueError: A mistake in the user's data or config, as the stage raised it.
    """
    from vidreason.config import trainer_cli
    from vidreason.lightning_modules.rl.rollouts import NoParsedCompletionsError

    nodes, devices = _processes(built, argv)
    if nodes > 1:
        raise ValueError(
            f"trainer.num_nodes is {nodes}, but a pipeline runs on one machine: choose another strategy for this stage "
            "(--strategy STAGE=NAME), or start each stage by itself on every node (docs/strategies.md)"
        )
    if devices > 1:
        return run_apart(argv)
    try:
        return trainer_cli.run(argv[0], argv[1:])
    except NoParsedCompletionsError as error:
        print(error, file=sys.stderr)
        return exit_codes.UNPARSED
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        gc.collect()  # a finished stage's model, before the next one is built


def _processes(built: Builds, argv: list[str]) -> tuple[int, int]:
    """Nodes, and processes on each, that a command would train with; a mistake in it shows when it runs."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from omegaconf.errors import OmegaConfBaseException

    try:
        trainer = built(argv).trainer
    except (argparse.ArgumentError, OmegaConfBaseException, MisconfigurationException):
        return 1, 1
    return trainer.num_nodes, trainer.num_devices


def run_apart(argv: list[str]) -> int:
    """Runs a command as a process of its own: a trainer with several starts the others by its own command line.

    Args:
        argv: As for :func:`run_stage`.

    Returns:
        Exit status.
    """
    with subprocess.Popen([sys.executable, "-m", "vidreason", *argv]) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # the stage saves a checkpoint first
        try:
            while True:
                with suppress(KeyboardInterrupt):  # it went to the stage, too
                    return process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)


def check_stage(built: Builds, argv: list[str]) -> str | None:
    """Finds a typo before hours are spent on the stages in front of it.

    Args:
        built: Where commands are built.
        argv: As for :func:`run_stage`; artefacts that it names need not exist yet.

    Returns:
        What is wrong, in one line; None where nothing is.

    Raises:
        ValueError: As model or data raised it when they were built.
    """
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from omegaconf.errors import OmegaConfBaseException

    from vidreason.config.command_files import config_files
    from vidreason.config.errors import explain

    try:
        built(argv)
    except (argparse.ArgumentError, OmegaConfBaseException) as error:
        return explain(str(error), config_files(argv), argv)
    except MisconfigurationException as error:
        return str(error)
    return None


def count_train_clips(built: Builds, argv: list[str]) -> int | None:
    """Counts the clips in split train of the data module that a command uses, for the summary.

    Args:
        built: Where commands are built.
        argv: As for :func:`run_stage`.

    Returns:
        The number of clips; None where the data module is not one of this package or cannot be built or read here.
    """
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from omegaconf.errors import OmegaConfBaseException

    from vidreason.datamodules.base import VideoDataModule

    try:
        data = built(argv).datamodule
        if not isinstance(data, VideoDataModule):
            return None
        data.prepare_data()
        with quietly(logging.WARNING):
            return len(data.clips("train"))
    except (argparse.ArgumentError, OmegaConfBaseException, MisconfigurationException, ValueError, OSError):
        return None  # e.g. a stage that was finished on another machine: its data set need not be here
