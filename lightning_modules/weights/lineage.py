"""The origin of a set of weights, as stored in ``vidreason.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from vidreason.datamodules.task import Task
from vidreason.lightning_modules.vlms.loading import weight_folders
from vidreason.lightning_modules.vlms.loading.weight_folders import INFO_FILE
from vidreason.run_folder import TASK_FILE

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
    definitions: tuple[str, ...]
    """[C] definitions of the classes, in the order of ``label_names``."""
    seed: int
    global_step: int
    """Number of optimizer steps."""
    inputs: dict[str, object] = field(default_factory=dict)
    """Prompts and video settings that the weights were trained with, see ``model_inputs.py``."""
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


def describe_weights(path: str | Path | None) -> str:
    """Returns which stage wrote the weights in a folder: ``stage grpo, step 40 (runs/x/.../adapter)``."""
    if path is None:
        return "the base, untrained"
    info = weight_folders.read_info(path)
    return f"stage {info.get('stage', 'of another program')}, step {info.get('global_step', '?')} ({path})"


def check_policy(path: str | Path | None) -> None:
    """Checks that weights are those of a policy.

    Raises:
        ValueError: If they are a calibrator's.
    """
    if path is not None and REVIEWED in (info := weight_folders.read_info(path)):
        raise ValueError(
            f"adapter_path: {path} was written by stage {info.get('stage')!r} and reviews another model's traces; give "
            "the adapter/ or weights/ of the stage before it"
        )


def check_task(path: str | Path | None, task: Task, refuse: bool = True) -> None:
    """Checks that weights were trained on the classes and definitions of ``task``.

    Args:
        path: Folder of the weights; None is the base, which fits every task.
        task: The task that they are used for.
        refuse: Whether another task is an error and not only a warning.

    Raises:
        ValueError: If they were trained on others; the message names what differs.
    """
    differs = None if path is None else other_task(weight_folders.read_info(path), task)
    if differs is None:
        return
    text = f"adapter_path: {path} was trained on {differs}"
    if refuse:
        raise ValueError(f"{text}; give the task of its run folder ({TASK_FILE}), or weights of this task")
    rank_zero_warn(text)


def other_task(info: Mapping[str, object], task: Task) -> str | None:
    """Returns in which classes or definitions the task of some weights differs from another one; None if in none.

    Args:
        info: Content of ``vidreason.json``; weights of another program, which have none, fit every task.
        task: The task that they are used for.
    """
    names, definitions = (info.get(key) for key in ("label_names", "definitions"))
    if isinstance(names, list) and names != list(task.label_names):
        return f"the classes {', '.join(map(str, names))}, not {', '.join(task.label_names)}"
    now = [spec.definition for spec in task.classes]
    if isinstance(definitions, list) and definitions != now:
        changed = zip(task.label_names, definitions, now, strict=True)
        return "other definitions: " + "; ".join(
            f"{n} was {old!r}, is {new!r}" for n, old, new in changed if old != new
        )
    return None
