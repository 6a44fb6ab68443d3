"""The origin of a set of weights, as stored in ``vidreason.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from vidreason.lightning_modules.vlms.loading import weight_folders
from vidreason.lightning_modules.vlms.loading.weight_folders import INFO_FILE

REVIEWED = "policy"
"""Key of ``vidreason.json`` that only calibrators have: the path of the policy whose traces they review."""


@dataclass(frozen=True)
class Lineage:
    """The origin of the weights that a stage exports."""

    stage: str
    """Name of the stage that trained them, for example ``sft_trace``."""
    base_sha: str
    """SHA-256 of the files of the base checkpoint."""
    parent_sha: str
    """SHA-256 of the adapter or weights that the stage started from; empty for the base."""
    task_sha: str
    """SHA-256 of the task (classes and prompts)."""
    label_names: tuple[str, ...]
    seed: int
    global_step: int
    """Number of optimizer steps."""
    extra: dict[str, object] = field(default_factory=dict)
    """Further entries of a stage at the top level of the file, for example a temperature."""

    def info(self) -> dict[str, object]:
        """Returns the content of ``vidreason.json``."""
        fields: dict[str, object] = asdict(self)
        fields.pop("extra")
        return {**fields, **self.extra}


def read_info(folder: str | Path) -> dict[str, object]:
    """Reads ``vidreason.json`` of an adapter or weights folder.

    Raises:
        ValueError: If there is no such file; the message names the folder.
    """
    info = weight_folders.read_info(folder)
    if not info:
        raise ValueError(f"{folder}: no {INFO_FILE} here; expected the adapter/ or weights/ folder that a stage wrote")
    return info
