"""The folder that a calibration stage exports and that the option ``calibrator_path`` reads.

::

    adapter/                 the calibrator, a PEFT folder
      vidreason.json         lineage, and: temperature, input, objective, policy, samples, sampling
      policy/                copy of the policy's adapter, if it has one

The entry ``policy`` is the path of the policy relative to ``adapter/``, so that run folders can be moved together:
``policy`` for the copy, the path of a ``weights/`` folder after full fine-tuning, or null for the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vidreason.datamodules.prompts import ReviewInput
from vidreason.lightning_modules.traces.generation import TraceOptions
from vidreason.lightning_modules.weights.lineage import REVIEWED, read_info


def calibrator_entries(
    temperature: float, input: ReviewInput, objective: str, policy: str | None, traces: TraceOptions
) -> dict[str, object]:
    """Returns the entries of ``vidreason.json`` that only a calibrator has."""
    return {
        "temperature": temperature,
        "input": input,
        "objective": objective,
        REVIEWED: policy,
        "samples": traces.samples,
        "sampling": asdict(traces.sampling),
    }


@dataclass(frozen=True)
class CalibratorInfo:
    """The entries of ``vidreason.json`` in a calibrator's folder."""

    temperature: float
    input: str
    policy: str | None
    sampling: Mapping[str, object] | None
    label_names: Sequence[str]
    task_sha: str
    parent_sha: str | None

    @classmethod
    def read(cls, folder: Path, stage: str) -> CalibratorInfo:
        """Reads the entries from a calibrator's ``adapter/``.

        Raises:
            ValueError: If another stage wrote the folder.
        """
        info = read_info(folder)
        if info.get("stage") != stage:
            raise ValueError(f"calibrator_path: {folder} was written by stage {info.get('stage')!r}, not by {stage}")
        values: dict[str, Any] = {field.name: info.get(field.name) for field in fields(cls)}
        return cls(**values)

    def check(self, folder: Path, input: ReviewInput, label_names: Sequence[str], task_sha: str) -> None:
        """Checks that the calibrator fits the settings of a run.

        Raises:
            ValueError: If it was trained with another input, class list or task.
        """
        if self.input != input:
            raise ValueError(
                f"calibrator_path: {folder} was trained with input {self.input!r}, but model.init_args.input is "
                f"{input!r}"
            )
        if list(self.label_names) != list(label_names):
            raise ValueError(f"calibrator_path: {folder} was trained on the classes {self.label_names}")
        if self.task_sha != task_sha:
            raise ValueError(
                f"calibrator_path: {folder} was trained on another task file (its question, definitions or prompts)"
            )
