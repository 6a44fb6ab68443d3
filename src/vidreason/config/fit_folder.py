"""The decision of a ``fit`` in a run folder that an earlier fit has used: start, resume, do nothing, or stop.

=================  ==================  =====================================================
the folder holds   same configuration  another configuration
=================  ==================  =====================================================
nothing            start               start
unfinished fit     resume              stop; the message names the keys that differ
finished fit       nothing to do       stop: ``--force``, or another ``--run_dir``
=================  ==================  =====================================================

``--ckpt_path`` with a checkpoint of the folder resumes in any case; ``fit/resume.py`` says what it may change.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from vidreason.datamodules.atomic_files import write_text
from vidreason.run_folder import (
    CHECKPOINTS_FOLDER,
    COMMAND_FILE,
    CONFIG_FILE,
    FINISHED_FILE,
    LAST_CHECKPOINT,
    TRACES_FILE,
    artefact_path,
)
from vidreason.run_lock import LOCK_FILE

_PLACES = ("run_dir", "ckpt_path", "config", "trainer.default_root_dir")
"""Keys that say where a fit reads and writes, not what it computes."""
WITHOUT_EFFECT = (
    ".frames.cache",
    ".frames.cache_gb",
    ".vision_cache.folder",
    ".vision_cache.max_gb",
    ".vision_cache.memory_gb",
    ".init_args.num_workers",
    ".init_args.prefetch_batches",
    ".init_args.pin_memory",
    "logger",
)
"""Ends of keys that change where frames and embeddings are kept, how fast they come and where curves go, but not what
is computed."""
_MOST_NAMED = 5


@dataclass(frozen=True)
class Beginning:
    """The way in which a fit begins, and the checkpoint that it resumes from."""

    action: Literal["start", "resume", "nothing"]
    checkpoint: Path | None = None
    """The checkpoint of the folder to resume from; None if an interrupted fit has left none."""


def begin_fit(folder: Path, config: Mapping[str, Any], checkpoint: str | None, reset: bool) -> Beginning:
    """Decides how a fit begins in ``folder``, from the table of this module.

    Args:
        folder: The run folder.
        config: The configuration of the fit, as it would be saved.
        checkpoint: The option ``--ckpt_path``.
        reset: The option ``--reset_optimizer``: only the weights of the checkpoint are used.

    Raises:
        ValueError: If the folder holds a fit that this one would overwrite.
    """
    if not _holds_fit(folder):
        return Beginning("start")
    last = folder / CHECKPOINTS_FOLDER / LAST_CHECKPOINT
    finished = (folder / FINISHED_FILE).is_file()
    differing = _differences(folder / CONFIG_FILE, config)
    own = checkpoint is not None and Path(checkpoint).resolve().is_relative_to(folder.resolve())
    if not reset and not differing and (own or checkpoint is None):
        if finished:
            return Beginning("nothing")
        return Beginning("resume", Path(checkpoint) if checkpoint else last if last.is_file() else None)
    if own and not reset:
        return Beginning("resume", Path(str(checkpoint)))
    # What else changes belongs to the optimizer or the order of clips, for which the stage refuses the checkpoint.
    free = ("trainer.", "checkpoint.")
    may_change = all(key.startswith(free) or key.endswith(".frames.timeout") for key in differing)
    resumes = last.is_file() and may_change and checkpoint is None
    if checkpoint is not None:
        differing = {"ckpt_path": f"it begins with {checkpoint}"}
    named = "; ".join([*differing.values()][:_MOST_NAMED])
    named += f"; and {len(differing) - _MOST_NAMED} more" if len(differing) > _MOST_NAMED else ""
    raise ValueError(
        f"{folder} holds {'a finished' if finished else 'an unfinished'} fit, and this one differs ({named}): give "
        + (f"--ckpt_path {last} to go on from there, " if resumes else "")
        + f"--force to start again (the folder's files move to {folder.name}.old), or another --run_dir"
    )


def clear_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """Moves the content of a run folder to ``NAME.old``, which replaces an earlier one.

    Raises:
        ValueError: If the configuration reads a file of the folder, which would be gone.
    """
    if not _holds_fit(folder):
        return  # what an earlier --force moved to NAME.old stays there
    here = folder.resolve()
    for key, value in _flat(config):
        if key not in _PLACES[:1] and isinstance(value, str) and ("/" in value or (folder / value).exists()):
            path = Path(value).resolve()
            if path != here and path.is_relative_to(here) and path.exists():
                raise ValueError(f"--force moves the files of {folder}, but {key} is {value}: give another --run_dir")
    old = here.with_name(f"{here.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    old.mkdir()
    for path in [path for path in here.iterdir() if path.name != LOCK_FILE]:
        path.rename(old / path.name)


def mark_finished(folder: Path, steps: int, epochs: int) -> None:
    """Records that the fit in ``folder`` has finished."""
    write_text(folder / FINISHED_FILE, json.dumps({"optimizer_steps": steps, "epochs": epochs}) + "\n")


def _holds_fit(folder: Path) -> bool:
    """Returns whether a fit has left something in ``folder`` that took time to compute."""
    command = folder / COMMAND_FILE
    if not (folder / CONFIG_FILE).is_file() or not command.is_file():
        return False
    if not command.read_text(encoding="utf-8").startswith("vidreason fit"):
        return False
    results = (folder / FINISHED_FILE, folder / TRACES_FILE, folder / CHECKPOINTS_FOLDER / LAST_CHECKPOINT)
    return any(path.is_file() for path in results) or artefact_path(folder, "adapter") is not None


def _differences(file: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns "KEY is NEW, was OLD" for every key in which a saved configuration differs."""
    before = dict(_flat(yaml.safe_load(file.read_text(encoding="utf-8"))))
    now = dict(_flat(config))
    keys = [key for key in sorted({*before, *now} - {*_PLACES}) if not key.endswith(WITHOUT_EFFECT)]
    keys = [key for key in keys if not _same(before.get(key), now.get(key))]
    return {key: f"{key} is {_shown(now.get(key))}, was {_shown(before.get(key))}" for key in keys}


def _same(before: object, now: object) -> bool:
    """Returns whether two values are equal; what was saved as a name may be a folder since, and is absolute then."""
    if isinstance(before, str) and isinstance(now, str):
        return now in (before, str(Path(before).absolute()))
    return before == now


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flat(content: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yields (dotted key, value) of every value that is not a mapping; lists of mappings are numbered."""
    if isinstance(content, Mapping) and content:
        for name, value in content.items():
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list) and any(isinstance(item, Mapping) for item in content):
        for number, item in enumerate(content):
            yield from _flat(item, f"{key}.{number}")
    else:
        yield key, content
