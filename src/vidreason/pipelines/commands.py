"""The commands that pipelines run: in this process, because starting another costs seconds of imports."""

from __future__ import annotations

import argparse
import gc
import hashlib
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
from vidreason.pipelines.content import UNPROVEN, listing_print

if TYPE_CHECKING:
    from vidreason.config.trainer_cli import VideoCLI


@dataclass(frozen=True)
class Commands:
    """The commands that a pipeline needs, called with the arguments after ``vidreason``; tests replace them."""

    run: Callable[[list[str]], int]
    """Runs a command and returns its exit status."""
    check: Callable[[list[str]], str | None]
    """Builds what a command would use, without weights; returns the error in one line, or None."""
    train_clips: Callable[[list[str]], int | None]
    """Returns the number of training clips of a command; None if the data module does not provide it."""
    own_inputs: Callable[[list[str]], dict[str, str]] = lambda argv: {}
    """Fingerprints what the user's own data module and rewards of a command say that they read."""
    profile: Callable[[list[str]], str | None] = lambda argv: None
    """Returns the name of the profile that a command takes its settings from, if any."""


class Builds:
    """Builds commands without weights and keeps them, because several checks need the same one."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], VideoCLI] = {}

    def __call__(self, argv: list[str]) -> VideoCLI:
        """Builds a command, or returns the one that was built for the same arguments."""
        from vidreason.config import trainer_cli

        key = tuple(argv)
        if key not in self._known:
            with quietly():
                self._known[key] = trainer_cli.build(argv[0], argv[1:])
        return self._known[key]


def trainer_commands() -> Commands:
    """Returns the commands of this package."""
    built = Builds()
    return Commands(
        run=partial(run_stage, built),
        check=partial(check_stage, built),
        train_clips=partial(count_train_clips, built),
        own_inputs=partial(fingerprint_own_classes, built),
        profile=partial(name_profile, built),
    )


def run_stage(built: Builds, argv: list[str]) -> int:
    """Runs ``fit``, ``predict`` or ``test``.

    Args:
        built: Cache of built commands.
        argv: Arguments after ``vidreason``, for example ``fit --config ...``.

    Returns:
        Exit status; ``exit_codes.UNPARSED`` if the stage stopped because no completion could be parsed.

    Raises:
        ValueError: If the user's data or config has a mistake, as raised by the stage.
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
        gc.collect()  # frees the model of a finished stage, which is part of reference cycles


def _processes(built: Builds, argv: list[str]) -> tuple[int, int]:
    """Returns (nodes, processes per node) of a command; (1, 1) if it cannot be built, which its run reports."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from omegaconf.errors import OmegaConfBaseException

    try:
        trainer = built(argv).trainer
    except (argparse.ArgumentError, OmegaConfBaseException, MisconfigurationException):
        return 1, 1
    return trainer.num_nodes, trainer.num_devices


def run_apart(argv: list[str]) -> int:
    """Runs a command in a process of its own.

    A trainer on several devices starts its other processes with the command line of its own process, which must
    therefore be that of the stage.

    Args:
        argv: Arguments after ``vidreason``.

    Returns:
        Exit status.
    """
    with subprocess.Popen([sys.executable, "-m", "vidreason", *argv]) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # the stage saves a checkpoint first
        try:
            while True:
                with suppress(KeyboardInterrupt):  # the terminal sends it to the stage as well, which ends in order
                    return process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)


def check_stage(built: Builds, argv: list[str]) -> str | None:
    """Checks a stage by building it, so that a typo is found before earlier stages have run for hours.

    Args:
        built: Cache of built commands.
        argv: Arguments after ``vidreason``; artefacts that they name need not exist yet.

    Returns:
        The error in one line, or None.

    Raises:
        ValueError: If model or data reject their arguments.
    """
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from omegaconf.errors import OmegaConfBaseException

    from vidreason.config.errors import explain_call
    from vidreason.datamodules.base import VideoDataModule

    try:
        data = built(argv).datamodule
        if isinstance(data, VideoDataModule) and data.fold.of:
            data.prepare_data()
            with quietly(logging.WARNING):
                data.clips("train")  # the clips may not fill the folds
    except (argparse.ArgumentError, OmegaConfBaseException) as error:
        return explain_call(str(error), argv)
    except MisconfigurationException as error:
        return str(error)
    return None


def name_profile(built: Builds, argv: list[str]) -> str | None:
    """Returns the name of the profile that a command takes its settings from, if any.

    Args:
        built: Cache of built commands; the command has passed its check.
        argv: Arguments after ``vidreason``.
    """
    profile = built(argv).profile
    return None if profile is None else profile.name


def count_train_clips(built: Builds, argv: list[str]) -> int | None:
    """Returns the number of clips in split train of the data module of a command, for the summary.

    Args:
        built: Cache of built commands.
        argv: Arguments after ``vidreason``.

    Returns:
        The number of clips; None if the data module is not a ``VideoDataModule``, or cannot be built or read here.
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
        return None  # e.g. the stage finished on another machine, which has the data set


def fingerprint_own_classes(built: Builds, argv: list[str]) -> dict[str, str]:
    """Fingerprints what the user's own data module and rewards read, of which no YAML file tells.

    A data module lists its clips in ``samples()``. What else an object reads, it tells by a method ``fingerprint()``,
    whose result may be of any type with a stable text.

    Args:
        built: Cache of built commands.
        argv: Arguments after ``vidreason``.
    """
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from omegaconf.errors import OmegaConfBaseException

    from vidreason.datamodules.base import VideoDataModule

    try:
        cli = built(argv)
        data, prints = cli.datamodule, dict[str, str]()
        for thing in (data, cli.model, *getattr(cli.model, "rewards", ())):
            if not type(thing).__module__.startswith("vidreason.") and hasattr(thing, "fingerprint"):
                prints[f"{type(thing).__name__}.fingerprint()"] = str(thing.fingerprint())
        key = f"{type(data).__name__}.samples()"
        if isinstance(data, VideoDataModule) and not type(data).__module__.startswith("vidreason."):
            with quietly(logging.WARNING):
                data.prepare_data()
                clips = [(split, clip) for split in data.splits() for clip in data.samples(split)]
            told = "".join(f"{split} {clip}\n" for split, clip in clips)
            content = listing_print(clip.path for _, clip in clips)
            prints[key] = f"{content} of {hashlib.sha256(told.encode()).hexdigest()[:16]}"
        elif not isinstance(data, VideoDataModule) and not hasattr(data, "fingerprint"):
            prints[key] = f"{UNPROVEN}{type(data).__name__} has neither samples() nor fingerprint()"
        return prints
    except (argparse.ArgumentError, OmegaConfBaseException, MisconfigurationException, ValueError, OSError) as error:
        return {"own classes": f"{UNPROVEN}{' '.join(str(error).split())[:100]}"}
