"""The ``vidreason`` command: selects the subcommand and prints mistakes of the user as one line.

It imports the standard library only, so that ``vidreason --help`` is fast; a subcommand is imported when it is called.
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import re
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import vidreason
from vidreason import exit_codes
from vidreason.spelling import did_you_mean, printable

COMMANDS = {
    "demo": "the whole main job on the embedded default, within minutes",
    "init": "your own clips: look into a folder or table of them and write what the other commands read",
    "data": "check: what is wrong with the clips of a manifest; cache: decode the clips of a fit beforehand",
    "plan": "tokens, steps and memory of a stage or pipeline before it runs: --memory 24GB",
    "pipeline": "stages in order: --config configs/pipelines/deepintuit.yaml --run_dir runs/x",
    "evaluate": "which stage of a run brings what, with intervals and comparisons: --run runs/x",
    "report": "evaluated runs as one HTML file, with charts and clips: runs/x --out report.html",
    "threshold": "the confidence below which a run abstains, for an error of 10 %: --run runs/x",
    "export": "write the model of a run for transformers, peft and vLLM: runs/x --out my_model",
    "serve": "answer questions about clips over HTTP: --run runs/x",
    "classify": "ask a finished run about new clips: clip.mp4 --run runs/x [--out results.jsonl]",
    "fit": "train one stage: --config configs/sft_label.yaml",
    "validate": "compute the validation metrics of a stage",
    "test": "compute the test metrics and write predictions.jsonl",
    "predict": "generate rationales or traces and write traces.jsonl",
    "configs": "list the shipped YAML files, or copy them: --copy DIR",
}
_TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
_TRACEBACK_OPTIONS = ("--debug", "--traceback")
_SYSTEM_SAYS_NO = {
    errno.ENOSPC: "the disk is full; free some space and give the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and give the same command again",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.EACCES: "no permission; change it or use another place",
}

_FAILURES = {
    "DecodeError": exit_codes.ERROR,
    "NonFiniteError": exit_codes.ERROR,
    "TooManyUnreadableError": exit_codes.ERROR,
    "OutOfMemoryError": exit_codes.ERROR,
    "NoParsedCompletionsError": exit_codes.UNPARSED,
}
"""Errors that are not a mistake in the command line, a YAML file or a table, with their exit status.

They are given by name, because importing the classes would import torch.
"""
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the older name
_OUTPUTS = ("--json", "--out")
"""Options that may name a device to write to."""
_CLASSIFIERS = ("--run", "--export", "--base", "--root", "--out")
"""Options of ``classify`` that name a file or folder."""
_KERNEL_LOGGER = "bitsandbytes.backends.cpu.ops"
# How torch.utils.data re-raises an exception of a DataLoader worker: its traceback becomes the message.
_WORKER_ERROR = re.compile(r"\ACaught (\w+) in DataLoader worker process")


def run() -> NoReturn:
    """Runs the command line of this process and ends it, at once if it was interrupted.

    The interpreter takes seconds to take torch down, and would wait for workers that are reading.
    """
    status = main()
    if status == exit_codes.INTERRUPTED:
        for worker in multiprocessing.active_children():
            worker.terminate()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; may be called several times in one process.

    Args:
        argv: Command line without the name of the program; by default ``sys.argv[1:]``.

    Returns:
        Exit status: 0 success, 1 failed run, 2 mistake on the command line, in a config or in a table of the data, 5 no
        completion of GRPO could be parsed, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    asked = any(option in arguments for option in _TRACEBACK_OPTIONS)
    show_traceback = asked or os.environ.get("VIDREASON_TRACEBACK", "") not in ("", "0")
    arguments = [argument for argument in arguments if argument not in _TRACEBACK_OPTIONS]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return exit_codes.OK
    if arguments[0] == "--version":
        print(f"vidreason {vidreason.__version__}")
        return exit_codes.OK
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS) or f": one of {', '.join(COMMANDS)}"
        print(f"error: unknown command {command!r}{hint}", file=sys.stderr)
        return exit_codes.USAGE
    _append_current_folder()
    logging.getLogger(_KERNEL_LOGGER).addFilter(_not_about_optional_kernels)
    try:
        with _without_warnings_of_libraries():
            _look_at_paths(command, rest)
            return _dispatch(command, rest)
    except SystemExit as stop:
        return _exit_status(stop)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return exit_codes.INTERRUPTED
    except ValueError as error:
        if show_traceback or not raised_by_user_code(error):
            raise
        print(f"error: {printable(message_of(error))}", file=sys.stderr)
        return _FAILURES.get(_kind_of(error), exit_codes.USAGE)
    except OSError as error:
        if show_traceback or (error.filename is None and error.errno not in _SYSTEM_SAYS_NO):
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{_SYSTEM_SAYS_NO.get(error.errno or 0, error.strerror)}", file=sys.stderr)
        return exit_codes.ERROR


def raised_by_user_code(error: ValueError) -> bool:
    """Returns whether an error comes from the user's data, YAML or class and not from inside a library.

    Args:
        error: The exception with its traceback; one from a DataLoader worker has the traceback in its message.

    Returns:
        True if the innermost frame is in vidreason or in code that is not installed (the user's own).
    """
    if _WORKER_ERROR.match(str(error)):
        files = re.findall(r'^  File "(.+?)", line \d+', str(error), flags=re.MULTILINE)
    else:
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if not files:
        return False
    innermost = Path(files[-1])
    if Path(vidreason.__file__).parent in innermost.parents:
        return True
    # Lightning raises ValueError where its settings do not fit each other, such as an interval longer than an epoch.
    if re.search(r"/lightning/pytorch/(trainer|loops)/", innermost.as_posix()):
        return True
    libraries = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return innermost.is_file() and libraries.isdisjoint(innermost.parents)


def _kind_of(error: ValueError) -> str:
    """Returns the name of the error's class, also for an error of a DataLoader worker."""
    in_worker = _WORKER_ERROR.match(str(error))
    return in_worker[1] if in_worker else type(error).__name__


def message_of(error: ValueError) -> str:
    """Returns the message of an error, without the traceback that a DataLoader worker adds."""
    text = str(error).strip()
    # the last line of a traceback reads "ValueError: message"
    if _WORKER_ERROR.match(text):
        text = text.splitlines()[-1].partition(": ")[2]
    return text


@contextmanager
def _without_warnings_of_libraries() -> Iterator[None]:
    """Hides what libraries say to programmers, of which one run may print hundreds; ``python -W`` shows it."""
    with warnings.catch_warnings():
        if not sys.warnoptions:
            for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", category)
        yield


def _look_at_paths(command: str, words: Sequence[str]) -> None:
    """Looks within a time limit at each file and folder of a command line, before a command that opens it would block.

    Clips of ``classify`` are not looked at: one that does not answer costs only itself.

    Raises:
        ValueError: If one does not answer, or is a pipe where a file is read; the message names it.
    """
    for before, word in pairwise(["", *words]):
        option, equals, value = word.partition("=")
        if not word.startswith("-"):
            option, value = before if before.startswith("-") and "=" not in before else "", word
        elif not equals:
            continue
        if (command == "classify" and option not in _CLASSIFIERS) or value[:1] in ("", "{", "["):
            continue
        from vidreason.datamodules.clips.time_limit import NO_FILE, look_at

        if look_at(Path(value)) == "other" and option not in _OUTPUTS:
            named = f"{option} {value}".strip()
            raise ValueError(f"{named}: {NO_FILE}")


def _dispatch(command: str, rest: list[str]) -> int:
    """Imports and runs a command."""
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"  # read by torch at its first allocation on a GPU
    if command in _TRAINER_COMMANDS:
        from vidreason.config import trainer_cli

        return trainer_cli.run(command, rest)
    module = import_module(f"vidreason.cli.{command}")
    return int(module.main(rest))


def _not_about_optional_kernels(record: logging.LogRecord) -> bool:
    """Filters out the warning of bitsandbytes about an optional kernel package when peft imports it."""
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")


def _append_current_folder() -> None:
    """Appends the current folder to ``sys.path`` for ``class_path``; last, so that it shadows no installed module."""
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:  # "" is the current folder, too
        sys.path.append(folder)


def _exit_status(stop: SystemExit) -> int:
    """Returns the status that Python itself would exit with, after printing a message if there is one."""
    if stop.code is None:
        return exit_codes.OK
    if isinstance(stop.code, int):
        return stop.code
    print(stop.code, file=sys.stderr)
    return exit_codes.ERROR


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vidreason COMMAND [options]",
            "",
            "Teach a vision-language model to reason about videos, then to decide.",
            "",
            "commands:",
            *lines,
            "",
            "options:",
            "  --help       after a command: its own options",
            "  --debug      show where an error comes from (also --traceback, or VIDREASON_TRACEBACK=1)",
            "  --version",
            "",
            "`vidreason demo` needs nothing else.",
        ]
    )
