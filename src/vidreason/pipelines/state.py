"""Writes the state of a run folder, compares inputs of stages and finds stages of other runs.

``state.json`` is replaced atomically after every change, so that a run that is killed leaves the state before or after
a change, never a partly written file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from vidreason.datamodules.atomic_files import write_text
from vidreason.pipelines.content import UNPROVEN
from vidreason.run_folder import (
    STATE_FILE,
    STATE_VERSION,
    SUMMARY_FILE,
    TEXT_QUALITY_FILE,
    UNREADABLE_FILE,
    RunState,
    StageRecord,
)


def save_state(state: RunState, run_dir: Path) -> None:
    """Writes ``state.json`` atomically."""
    write_text(run_dir / STATE_FILE, json.dumps({"vidreason_state": STATE_VERSION, **asdict(state)}, indent=1))


def changed_inputs(before: Mapping[str, str], now: Mapping[str, str], prove: bool = True) -> list[str]:
    """Returns the sorted names of inputs that were added, removed or changed.

    Args:
        before: Fingerprints by name.
        now: Fingerprints by name.
        prove: Whether an input that cannot be proven unchanged counts as changed; it is then named with the reason.

    >>> changed_inputs({"set seed": "0", "file a.yaml": "x"}, {"set seed": "1", "file a.yaml": "x"})
    ['set seed']
    """
    changed = {key for key in {*before, *now} if before.get(key) != now.get(key)}
    unproven = [f"{key} ({value})" for key, value in now.items() if value.startswith(UNPROVEN) and key not in changed]
    return sorted([*changed, *(unproven if prove else [])])


def find_taken_stage(name: str, folder: Path) -> tuple[Path, StageRecord]:
    """Finds a finished stage of another run.

    Args:
        name: The stage's name.
        folder: Folder of the other run, or of the stage within it.

    Returns:
        The folder of the stage and its record in the state of that run.

    Raises:
        ValueError: If the folder belongs to no run, or the stage has not finished there.
    """
    option = f"--use {name}={folder}"
    candidates = (folder, folder.parent.parent)  # RUN or RUN/stages/NN_name
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
    """Returns a note on the training clips that a stage could not read, or an empty text."""
    path = folder / UNREADABLE_FILE
    if not path.is_file():
        return ""
    # the first line is the header
    clips = len(path.read_text(encoding="utf-8").splitlines()) - 1
    return f"went without {clips} training clip{'s'[: clips > 1]} that could not be read: {path}"


def text_faults(folder: Path) -> tuple[str, ...]:
    """Returns why the texts that a stage wrote are no language about its clips; empty if they are, or are unjudged."""
    path = folder / TEXT_QUALITY_FILE
    return tuple(json.loads(path.read_text(encoding="utf-8"))["faults"]) if path.is_file() else ()


def stage_notes(folder: Path) -> str:
    """Returns what the summary has to say about a finished stage, or an empty text."""
    faults = text_faults(folder)
    told = f"wrote no language about these clips ({'; '.join(faults)}): name a model that can, --vlm" if faults else ""
    return "; ".join(filter(None, (unreadable_note(folder), told)))


def run_notes(run_dir: Path) -> list[str]:
    """Returns what a pipeline's summary, or before it is written its stages, have to say about the result."""
    path = run_dir / SUMMARY_FILE
    if path.is_file():
        rows = json.loads(path.read_text(encoding="utf-8"))
        return list(dict.fromkeys(row["note"] for row in rows if row.get("note")))
    state = RunState.load(run_dir)
    return [f"{name} {record.note}" for name, record in state.stages.items() if record.note] if state else []
