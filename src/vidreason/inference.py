"""VideoClassifier: applies the model of a finished run to clips and returns calibrated decisions with their traces.

It builds the model from the config of the run, without a Trainer, and uses the decider of the stage: the same prompts,
sampling and code as in ``vidreason test``. A clip of the run's data set is recognised by its content and gets the same
decision as in ``predictions.jsonl``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from vidreason.config.built_stage import build_stage
from vidreason.config.finished_stage import FinishedStage, find_stage, threshold_folder
from vidreason.config.quiet import quietly
from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.inference_data import INFERENCE_SPLIT, InferenceDataModule, KnownClips
from vidreason.datamodules.task import Task
from vidreason.datamodules.traces import TraceRecord
from vidreason.datamodules.types import Clip, VideoBatch
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.decisions.deciders import (
    AnswerDecider,
    Decider,
    ReviewDecider,
    decide_in_pieces,
)
from vidreason.lightning_modules.decisions.predictions import BatchDecisions
from vidreason.lightning_modules.decisions.threshold import THRESHOLD_FILE, Threshold
from vidreason.lightning_modules.fit.optimizer_step import check_precision
from vidreason.lightning_modules.vlms.loading.weight_folders import adapter_sha
from vidreason.lightning_modules.weights.lineage import check_task, describe_weights

Video = str | os.PathLike[str] | np.ndarray | Tensor


@dataclass(frozen=True)
class Decision:
    """The decision of the model about one clip."""

    video: str
    """Path of the file, or ``frames 0``, ``frames 1`` … for frames in memory."""
    label: str | None
    """None if the clip could not be read, no answer could be parsed, or the classifier abstained."""
    probs: Mapping[str, float]
    """Probability of every class, in the task's order: of a calibration stage temperature-scaled, of several sampled
    answers their shares. Empty if the clip could not be read, or the stage samples a single answer."""
    traces: tuple[str, ...]
    """The completions that the decision is based on; empty if the model decides without reasoning."""
    seconds: float
    """Wall time in seconds: the time of the batch divided by its clips."""
    error: str | None = None
    """The reason why the clip could not be read; None if it was read."""
    abstained: bool = False
    """Whether the confidence is below the threshold of ``vidreason threshold``; ``label`` is None then, and ``probs``
    are given all the same."""


class VideoClassifier:
    """Decides about clips with the model of a finished run.

    Use :meth:`from_run`; ``answers`` says which stage answers. Weights are loaded once, with a policy and its
    calibrator as two adapters on one base. Each adapter encodes a clip once for all its traces and labels.

    Example::

        classify = VideoClassifier.from_run("runs/mine")
        decision = classify("clip.mp4")
        decision.label, decision.probs, decision.traces
    """

    def __init__(self, stage: FinishedStage, batch_size: int = 8) -> None:
        with quietly(), _random_state_restored():
            built = build_stage("test", list(stage.options))
        if not isinstance(built.model, VLMModule) or not isinstance(built.data, VideoDataModule):
            raise ValueError(f"{stage.folder}: {type(built.model).__name__} is no stage that decides about clips")
        self._module, data = built.model, built.data
        self._task, self._known = _task_and_clips(data, stage.task_file)
        self.answers = describe_weights(stage.weights[-1] if stage.weights else None)
        self.threshold = _threshold_of(stage)
        self._data = InferenceDataModule(self._task, self._module.vlm, data.frames, data.seed, batch_size)
        check_precision(str(built.precision))
        self._fabric = L.Fabric(accelerator=built.accelerator, devices=1, precision=built.precision)
        with torch.inference_mode(), quietly(), _random_state_restored():
            self._module.read_artefacts(self._task)
            check_task(self._module.adapter_path, self._task)
            self._model = self._module.build_model().to(self._fabric.device).eval()

    @classmethod
    def from_run(cls, run: str | os.PathLike[str], stage: str | None = None, batch_size: int = 8) -> VideoClassifier:
        """Loads the model of a run.

        Args:
            run: Run folder of a pipeline, or of a single ``vidreason fit`` or ``test``.
            stage: Stage of the pipeline whose model is used; by default the one that its last test stage tested.
            batch_size: Number of clips per batch.

        Raises:
            ValueError: If there is no such run or stage, or it has not finished.
        """
        return cls(find_stage(Path(run), stage), batch_size)

    @property
    def label_names(self) -> tuple[str, ...]:
        """[C] class names."""
        return self._task.label_names

    def __call__(
        self, video: Video | Sequence[Video], traces: int | None = None, fps: float | None = None
    ) -> Decision | list[Decision]:
        """Decides about one clip or several clips.

        Args:
            video: A path, or frames [T, H, W, 3] uint8; or a list of such.
            traces: Traces per clip (K); None uses the number of the run.
            fps: Frames per second of frames in memory.

        Returns:
            A decision, or a list of decisions if ``video`` is a list.

        Raises:
            ValueError: If frames have another shape or type or no ``fps``, or ``traces`` is below 1.
        """
        single = isinstance(video, str | os.PathLike | np.ndarray | Tensor)
        videos: Sequence[Video] = [video] if single else list(video)  # type: ignore[list-item,arg-type]
        decisions = list(self.decide(videos, traces, fps))
        return decisions[0] if single else decisions

    def decide(
        self, videos: Sequence[Video], traces: int | None = None, fps: float | None = None
    ) -> Iterator[Decision]:
        """Yields the decisions about several clips in order, one batch at a time.

        Args:
            videos: Paths, or frames [T, H, W, 3] uint8.
            traces: Traces per clip (K); None uses the number of the run.
            fps: Frames per second of frames in memory.

        Raises:
            ValueError: If frames have another shape or type or no ``fps``, or ``traces`` is below 1.
        """
        if traces is not None and traces < 1:
            raise ValueError(f"traces must be at least 1, got {traces}")
        size = self._data.batch_size
        for first in range(0, len(videos), size):
            yield from self._decide_batch(videos[first : first + size], first, traces, fps)

    def _decide_batch(
        self, videos: Sequence[Video], first: int, traces: int | None, fps: float | None
    ) -> Iterator[Decision]:
        start = time.perf_counter()
        names, clips, in_memory = [], [], {}
        for number, video in enumerate(videos, start=first):
            if isinstance(video, str | os.PathLike):
                names.append(os.fspath(video))
                clips.append(self._clip_of(Path(video), names[-1]))
            else:
                names.append(f"frames {number}")
                in_memory[names[-1]] = _frames(video, fps, names[-1])
                clips.append(Clip(Path(names[-1]), None, names[-1]))
        # the same file may be given twice; it is decided once
        self._data.set_clips(list({clip.video_id: clip for clip in clips}.values()), in_memory)
        with torch.inference_mode(), self._fabric.autocast(), quietly():
            found = self._decide_all(self._decider(traces))
        seconds = (time.perf_counter() - start) / len(videos)
        # A threshold holds for the number of traces that it was fitted with.
        threshold = self.threshold if self.threshold is None or traces in (None, self.threshold.samples) else None
        for name, clip in zip(names, clips, strict=True):
            yield self._decision(name, found[clip.video_id], seconds, threshold)

    def _clip_of(self, path: Path, name: str) -> Clip:
        """Returns the clip of the run's data set that has the same content, or a new clip.

        The id matters because the random numbers of sampling depend on it.
        """
        known = self._known.find(path)
        return Clip(path, None, name) if known is None else replace(known, path=path, label=None, split=INFERENCE_SPLIT)

    def _decider(self, samples: int | None) -> Decider:
        """Returns the decider of the stage, with newly generated traces of the current clips if it reviews traces."""
        decider = self._module.decider(self._task)
        if isinstance(decider, AnswerDecider):
            return replace(decider, samples=samples or decider.samples)
        if not isinstance(decider, ReviewDecider) or decider.input == "video":
            return decider
        generator = self._module.trace_generator(self._task, "reason")
        generator = replace(generator, options=replace(generator.options, samples=samples or generator.options.samples))
        traces: dict[str, list[TraceRecord]] = {}
        for batch in self._data.loader(INFERENCE_SPLIT, generator.view):
            for record in generator.records(self._model, batch.to(self._fabric.device), self.label_names):
                traces.setdefault(record.video_id, []).append(record)
        return replace(decider, traces=traces)

    def _decide_all(self, decider: Decider) -> dict[str, tuple[BatchDecisions, int] | str]:
        """Returns (decisions of the batch, row of the clip) by video id, or the error of an unreadable clip."""
        found: dict[str, tuple[BatchDecisions, int] | str] = {}
        batches: Iterator[VideoBatch] = iter(self._data.loader(INFERENCE_SPLIT, decider.view))
        for batch in batches:
            found |= {failed.clip.video_id: failed.error for failed in batch.failed}
            if len(batch):
                size = self._module.evaluation.clips_per_forward
                batch = batch.to(self._fabric.device)
                decisions = decide_in_pieces(decider, self._module.vlm, self._model, batch, size)
                found |= {clip.video_id: (decisions, row) for row, clip in enumerate(batch.clips)}
        return found

    def _decision(
        self, name: str, found: tuple[BatchDecisions, int] | str, seconds: float, threshold: Threshold | None
    ) -> Decision:
        if isinstance(found, str):
            return Decision(name, None, {}, (), seconds, found)
        decisions, row = found
        chosen = int(decisions.pred[row])
        probs = decisions.probabilities(row, self.label_names)
        texts = tuple(trace.text for trace in decisions.traces[row])
        unscaled = decisions.probs if decisions.unscaled is None else decisions.unscaled
        abstained = threshold is not None and not threshold.accepts(unscaled[row])
        label = self.label_names[chosen] if chosen >= 0 and not abstained else None
        return Decision(name, label, probs, texts, seconds, abstained=abstained)


@contextmanager
def _random_state_restored() -> Iterator[None]:
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


def _task_and_clips(data: VideoDataModule, saved_task: Path) -> tuple[Task, KnownClips]:
    """Returns the task of the run, and the clips of its data set, none if that is gone.

    The run folder's copy of the task counts: the file of the data set may have changed since.
    """
    saved = Task.from_yaml(saved_task) if saved_task.is_file() else None
    try:
        data.setup("test")
        known = KnownClips((c for split in data.splits() for c in data.clips(split)), data.frames.timeout)
        return saved or data.task, known
    except (ValueError, OSError):
        if saved is None:
            raise
        return saved, KnownClips(())


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


def _frames(video: np.ndarray | Tensor, fps: float | None, name: str) -> tuple[Tensor, float]:
    """Returns frames [T, H, W, 3] uint8 as ([T, 3, H, W], frames per second)."""
    frames = torch.as_tensor(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8 or not len(frames):
        raise ValueError(f"{name}: frames must be [T, H, W, 3] uint8, got {list(frames.shape)} {frames.dtype}")
    if fps is None or not fps > 0:
        raise ValueError(f"{name}: give the frames per second of frames in memory: fps=25.0")
    return frames.permute(0, 3, 1, 2), float(fps)
