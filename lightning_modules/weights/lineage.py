"""Who made a set of weights: what ``vidreason.json`` beside an adapter says, and where a stage keeps its artefacts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from vidreason.lightning_modules.vlms.loading import weight_folders
from vidreason.lightning_modules.vlms.loading.weight_folders import INFO_FILE

REVIEWED = "policy"
"""Key of ``vidreason.json`` that only calibrators have: whose traces they review"""


@dataclass(frozen=True)
class Lineage:
    """Origin of the weights that a stage hands on."""

    stage: str
    """Name of the stage that trained them, for example ``sft_trace``"""
    base_sha: str
    """Hash of the base checkpoint's files"""
    parent_sha: str
    """Hash of the adapter or weights that the stage started from; empty where it started from the base"""
    task_sha: str
    """Hash of the task: classes and prompts"""
    label_names: tuple[str, ...]
    seed: int
    global_step: int
    """Optimizer steps taken"""
    extra: dict[str, object] = field(default_factory=dict)
    """What only this stage has to say, for example a temperature; merged into the top level of the file"""

    def info(self) -> dict[str, object]:
        """Returns the content of ``vidreason.json``."""
        fields: dict[str, object] = asdict(self)
        fields.pop("extra")
        return {**fields, **self.extra}


def read_info(folder: str | Path) -> dict[str, object]:
    """Reads ``vidreason.json`` of an adapter or weights folder.

    Raises:
        ValueError: Where there is no such file, naming the folder.
    """
    info = weight_folders.read_info(folder)
    if not info:
        raise ValueError(f"{folder}: no {INFO_FILE} here; expected the adapter/ or weights/ folder that a stage wrote")
    return info
