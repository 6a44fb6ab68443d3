"""A model of a finished run, built from the run's config without a Trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from vidreason.config.built_stage import build_stage
from vidreason.config.finished_stage import FinishedStage, threshold_folder
from vidreason.config.quiet import quietly
from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.inference_data import KnownClips
from vidreason.datamodules.task import Task
from vidreason.datamodules.types import Clip
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.decisions.deciders import ReviewDecider
from vidreason.lightning_modules.decisions.threshold import THRESHOLD_FILE, Threshold
from vidreason.lightning_modules.fit.optimizer_step import check_precision
from vidreason.lightning_modules.vlms.loading.weight_folders import adapter_sha
from vidreason.lightning_modules.weights.answering import Answering
from vidreason.lightning_modules.weights.lineage import check_task, describe_weights


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with all that is needed to ask it about clips."""

    answering: Answering
    task: Task
    frames: FrameOptions
    seed: int
    """Seed of the run."""
    find_known: Callable[[Path], Clip | None]
    """Returns the clip of the run's data set with the content of a file; the noise of its traces goes by its id."""
    answers: str
    """The stage that answers and the folder of its weights, as one line."""
    threshold: Threshold | None
    fabric: L.Fabric
    weights_sha: str
    """SHA-256 of the weights that decide; empty if the base does."""
    precision: str


@dataclass(frozen=True)
class OpenedRun:
    """A stage of a run before its weights are loaded."""

    stage: FinishedStage
    module: VLMModule
    data: VideoDataModule
    task: Task
    clips: tuple[Clip, ...]
    """All clips of the data set; empty if it is gone."""
    threshold: Threshold | None
    accelerator: str
    precision: str

    @classmethod
    def of(cls, stage: FinishedStage) -> OpenedRun:
        """Builds the stage and its data from its config.

        Raises:
            ValueError: If the stage does not decide about clips, or its weights belong to another task.
        """
        with quietly(), random_state_restored():
            built = build_stage("test", list(stage.options))
        if not isinstance(built.model, VLMModule) or not isinstance(built.data, VideoDataModule):
            raise ValueError(f"{stage.folder}: {type(built.model).__name__} is no stage that decides about clips")
        task, clips = _task_and_clips(built.data, stage.task_file)
        check_precision(str(built.precision))
        with quietly(), random_state_restored():
            built.model.read_artefacts(task)
            check_task(built.model.adapter_path, task)
        threshold, precision = _threshold_of(stage), str(built.precision)
        return cls(stage, built.model, built.data, task, clips, threshold, built.accelerator, precision)

    def load(self) -> LoadedModel:
        """Loads the weights."""
        fabric = one_device(self.accelerator, self.precision)
        with torch.inference_mode(), quietly(), random_state_restored():
            model = self.module.build_model().to(fabric.device).eval()
        decider, module = self.module.decider(self.task), self.module
        reviews = isinstance(decider, ReviewDecider) and decider.input != "video"
        generator = module.trace_generator(self.task, "reason") if reviews else None
        size = module.evaluation.clips_per_forward
        return LoadedModel(
            answering=Answering(module.vlm, model, decider, generator, clips_per_forward=size),
            task=self.task,
            frames=self.data.frames,
            seed=self.data.seed,
            find_known=KnownClips(self.clips, self.data.frames.timeout).find,
            answers=describe_weights(self.stage.weights[-1] if self.stage.weights else None),
            threshold=self.threshold,
            fabric=fabric,
            weights_sha=adapter_sha(self.stage.weights[-1]) if self.stage.weights else "",
            precision=self.precision,
        )


def one_device(accelerator: str, precision: str) -> L.Fabric:
    """Returns the device of this process; under ``torchrun`` the processes of a machine take one GPU each."""
    rank = int(os.environ.get("LOCAL_RANK") or 0)
    gpus = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0
    devices: list[int] | int = [rank % gpus] if rank and gpus else 1
    return L.Fabric(accelerator=accelerator, devices=devices, precision=precision)  # type: ignore[arg-type]


@contextmanager
def random_state_restored() -> Iterator[None]:
    """Restores the random generators of the process, and the seed that Lightning keeps in the environment."""
    before = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    try:
        with isolate_rng():
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _task_and_clips(data: VideoDataModule, saved_task: Path) -> tuple[Task, tuple[Clip, ...]]:
    """Returns the task of the run, and the clips of its data set, none if that is gone.

    The run folder's copy of the task counts: the file of the data set may have changed since.
    """
    saved = Task.from_yaml(saved_task) if saved_task.is_file() else None
    try:
        data.setup("test")
        return saved or data.task, tuple(clip for split in data.splits() for clip in data.clips(split))
    except (ValueError, OSError):
        if saved is None:
            raise
        return saved, ()


def _threshold_of(stage: FinishedStage) -> Threshold | None:
    """Returns the threshold beside the weights of a stage; None if there is none.

    Raises:
        ValueError: If it belongs to other weights.
    """
    folder = threshold_folder(stage)
    found = Threshold.load(folder)
    if found is not None and found.weights_sha != (adapter_sha(stage.weights[-1]) if stage.weights else ""):
        raise ValueError(
            f"{folder / THRESHOLD_FILE}: belongs to other weights than those of this stage; run vidreason threshold "
            "again, or delete the file"
        )
    return found
