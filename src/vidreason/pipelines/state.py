"""What changed since a stage ran, what another run offers, and the writing of a run folder's state.

``state.json`` is replaced as a whole after every change, so that a run killed at any moment finds either the state
before or the state after.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from vidreason.datamodules.atomic_files import write_text
from vidreason.run_folder import STATE_FILE, STATE_VERSION, UNREADABLE_FILE, RunState, StageRecord


def save_state(state: RunState, run_dir: Path) -> None:
    """Writes ``state.json``, whole or not at all."""
    write_text(run_dir / STATE_FILE, json.dumps({"vidreason_state": STATE_VERSION, **asdict(state)}, indent=1))


def changed_inputs(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names of inputs that were added, dropped or changed, in order.

    >>> changed_inputs({"set seed": "0", "file a.yaml": "x"}, {"set seed": "1", "file a.yaml": "x"})
    ['set seed']
    """
    return sorted(key for key in {*before, *now} if before.get(key) != now.get(key))


def find_taken_stage(name: str, folder: Path) -> tuple[Path, StageRecord]:
    """Finds a finished stage of another run.

    Args:
        name: The stage's name.
        folder: That run's folder, or the stage's folder within it.

    Returns:
        The stage's folder and its record in that run's state.

    Raises:
        ValueError: The folder belongs to no run, or the stage is not finished there.
    """
    option = f"--use {name}={folder}"
    candidates = (folder, folder.parent.parent)
    run_dir = next((path for path in candidates if (path / STATE_FILE).is_file()), None)
    if run_dir is None:
        raise ValueError(f"{option}: neither a run folder nor a stage folder of one (no {STATE_FILE})")
    state = RunState.load(run_dir)
    record = state.stages.get(name) if state else None
    if record is None:
        raise ValueError(f"{option}: {run_dir} has no stage {name!r}")
    if record.status != "finished":
        raise ValueError(f"{option}: stage {name!r} of {run_dir} is {record.status}, not finished")
    stage_folder = run_dir / record.folder
    if folder != run_dir and folder.resolve() != stage_folder.resolve():
        raise ValueError(f"{option}: stage {name!r} of {run_dir} lies in {stage_folder}")
    return stage_folder, record


def unreadable_note(folder: Path) -> str:
    """What a stage was trained without, if anything; how often each clip was asked for stands in the file."""
    path = folder / UNREADABLE_FILE
    if not path.is_file():
        return ""
    clips = len(path.read_text(encoding="utf-8").splitlines()) - 1
    return f"went without {clips} training clip{'s'[: clips > 1]} that could not be read: {path}"
