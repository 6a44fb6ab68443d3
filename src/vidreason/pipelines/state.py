"""The state of a run folder: which stages are finished, on which inputs, and what they wrote.

``state.json`` is replaced as a whole after every change, so that a run killed at any moment finds either the state
before or the state after.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from vidreason.datamodules.atomic_files import write_text
from vidreason.pipelines.spec import ARTEFACT_FILES, Artefact

Status = Literal["running", "interrupted", "failed", "finished", "skipped"]
STATE_FILE = "state.json"
UNREAD_FILE = "unread_clips.csv"
"""Written by a fit: ``lightning_modules/unread_clips.py``"""
_VERSION = 1


@dataclass
class StageRecord:
    """What is known of one stage of a run."""

    status: Status
    folder: str
    """Relative to the run folder; a stage taken from another run has that run's folder"""
    inputs: dict[str, str]
    """Fingerprints of config, settings, data and upstream artefacts"""
    command: list[str] = field(default_factory=list)
    artefact_sha: str | None = None
    taken: bool = False
    """True: finished in another run and taken with ``--use``"""
    note: str = ""
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    """Times add up over every attempt on the same inputs"""

    @property
    def done(self) -> bool:
        """Nothing is left to do: finished, or ended without an artefact as the pipeline allows."""
        return self.status in ("finished", "skipped")


@dataclass
class RunState:
    """The state of one run folder."""

    pipeline: str
    train_clips: int | None = None
    stages: dict[str, StageRecord] = field(default_factory=dict)

    def save(self, run_dir: Path) -> None:
        """Writes ``state.json`` atomically."""
        write_text(run_dir / STATE_FILE, json.dumps({"vidreason_state": _VERSION, **asdict(self)}, indent=1))

    @classmethod
    def load(cls, run_dir: Path) -> RunState | None:
        """Reads ``state.json``; None where the folder has none.

        Raises:
            ValueError: The file is damaged or of another version.
        """
        path = run_dir / STATE_FILE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.get("vidreason_state") != _VERSION:
                raise ValueError(f"version {content.get('vidreason_state')!r}, expected {_VERSION}")
            known = {f.name for f in fields(StageRecord)}
            stages = {
                name: StageRecord(**{key: value for key, value in row.items() if key in known})
                for name, row in content["stages"].items()
            }
            return cls(content["pipeline"], content.get("train_clips"), stages)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); delete it to run every stage again") from error


def artefact_path(folder: Path, artefact: Artefact) -> Path | None:
    """Where a stage folder holds an artefact; None where it does not (empty ones count as missing)."""
    for name in ARTEFACT_FILES[artefact]:
        path = folder / name
        if path.is_dir() and any(path.iterdir()):
            return path
        if path.is_file() and path.stat().st_size > 0:
            return path
    return None


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


def unread_note(folder: Path) -> str:
    """What a stage was trained without, if anything; how often each clip was asked for stands in the file."""
    path = folder / UNREAD_FILE
    if not path.is_file():
        return ""
    clips = len(path.read_text(encoding="utf-8").splitlines()) - 1
    return f"went without {clips} training clip{'s'[: clips > 1]} that could not be read: {path}"
