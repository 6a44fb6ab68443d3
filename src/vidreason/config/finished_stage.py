"""Finds in a run folder the model to ask: which stage, its config, its weights and its task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from vidreason.run_folder import (
    CONFIG_FILE,
    STAGES_FOLDER,
    TASK_FILE,
    artefact_path,
    find_stage_folder,
    was_tested,
)

_WEIGHT_KEYS = ("adapter_path", "calibrator_path")


@dataclass(frozen=True)
class FinishedStage:
    """A stage whose model can be asked."""

    folder: Path
    options: tuple[str, ...]
    """Of ``vidreason test``: the stage's own config, with paths as they are now"""

    @property
    def task_file(self) -> Path:
        """Copy of the task that the stage ran on."""
        return self.folder / TASK_FILE


def find_stage(run: Path, name: str | None = None) -> FinishedStage:
    """Finds the stage to ask.

    Args:
        run: Run folder of a pipeline, or of a single ``vidreason fit`` or ``test``.
        name: Stage of the pipeline; None takes its last finished test, else its last finished training.

    Raises:
        ValueError: There is no such run or stage, or it has not finished; the message says what there is.
    """
    folder = find_stage_folder(run, name)
    config_file = folder / CONFIG_FILE
    model = yaml.safe_load(config_file.read_text(encoding="utf-8"))["model"]["init_args"]
    given = {key: model.get(key) for key in _WEIGHT_KEYS}
    weights = given if was_tested(folder) else _own_weights(folder, "calibrator_path" in model)
    options = ["--config", str(config_file)]
    for key in _WEIGHT_KEYS:
        if key in model:
            path = weights.get(key)
            options += [f"--model.init_args.{key}", "null" if path is None else _present(path, run)]
    return FinishedStage(folder, tuple(options))


def _own_weights(folder: Path, calibrates: bool) -> dict[str, str | None]:
    """What a training stage wrote, as the options that load it."""
    path = artefact_path(folder, "adapter")
    if path is None:
        raise ValueError(f"{folder}: holds neither adapter/ nor weights/, so the training has not finished")
    return {"adapter_path": None, "calibrator_path": str(path)} if calibrates else {"adapter_path": str(path)}


def _present(path: str, run: Path) -> str:
    """The path within ``run`` where it has been moved or is called from elsewhere; otherwise the path itself."""
    parts = Path(path).parts
    if STAGES_FOLDER in parts:
        moved = run.joinpath(*parts[len(parts) - 1 - parts[::-1].index(STAGES_FOLDER) :])
        if moved.exists():
            return str(moved)
    return path
