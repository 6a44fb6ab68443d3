"""Finds the model to use in a run folder: the stage, its config, its weights and its task."""

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
    """A finished stage whose model can be used."""

    folder: Path
    options: tuple[str, ...]
    """Options of ``vidreason test``: the config of the stage, with current paths of the weights."""
    weights: tuple[str, ...] = ()
    """Paths of the weights; empty for the base."""

    @property
    def task_file(self) -> Path:
        """Path of the stage's copy of its task."""
        return self.folder / TASK_FILE


def find_stage(run: Path, name: str | None = None) -> FinishedStage:
    """Finds the stage whose model is used.

    Args:
        run: Run folder of a pipeline, or of a single ``vidreason fit`` or ``test``.
        name: Stage of the pipeline; None selects its last finished test, else its last finished training.

    Raises:
        ValueError: If there is no such run or stage, or it has not finished (the message lists what exists), or it
            tested a checkpoint, which is no folder of weights.
    """
    folder = find_stage_folder(run, name)
    config_file = folder / CONFIG_FILE
    config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    model = config["model"]["init_args"]
    if was_tested(folder) and (checkpoint := config.get("ckpt_path")) is not None:
        raise ValueError(f"{folder}: tested the checkpoint {checkpoint}; give the run folder of the fit that wrote it")
    given = {key: model.get(key) for key in _WEIGHT_KEYS}
    # a test evaluates the weights that its config names; a training starts from those and writes its own
    weights = given if was_tested(folder) else _own_weights(folder, "calibrator_path" in model)
    # a checkpoint in the config would be loaded over the weights
    options, used = ["--config", str(config_file), "--ckpt_path", "null"], list[str]()
    for key in _WEIGHT_KEYS:
        if key in model:
            path = weights.get(key)
            used += [] if path is None else [_present(path, run)]
            options += [f"--model.init_args.{key}", "null" if path is None else used[-1]]
    return FinishedStage(folder, tuple(options), tuple(used))


def threshold_folder(stage: FinishedStage) -> Path:
    """Returns the folder of a stage's threshold: beside its weights, or of the stage itself if it runs the base."""
    return Path(stage.weights[-1]).parent if stage.weights else stage.folder


def _own_weights(folder: Path, calibrates: bool) -> dict[str, str | None]:
    """Returns the weights that a training stage wrote, as the options that load them.

    Raises:
        ValueError: If the folder has no weights.
    """
    path = artefact_path(folder, "adapter")
    if path is None:
        raise ValueError(f"{folder}: holds neither adapter/ nor weights/, so the training has not finished")
    return {"adapter_path": None, "calibrator_path": str(path)} if calibrates else {"adapter_path": str(path)}


def _present(path: str, run: Path) -> str:
    """Returns the path within ``run`` if that exists (the run may have been moved), else the path itself."""
    parts = Path(path).parts
    if STAGES_FOLDER in parts:
        moved = run.joinpath(*parts[len(parts) - 1 - parts[::-1].index(STAGES_FOLDER) :])  # from the last stages/ on
        if moved.exists():
            return str(moved)
    return path
