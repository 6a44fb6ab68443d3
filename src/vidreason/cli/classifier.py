"""VideoClassifier: a finished run as a function from clips to calibrated decisions with their reasons.

It is the run's own test stage on other clips: the same prompts, the same sampling, the same code that decides. A clip
of the run's data set is found by its content and gets what ``predictions.jsonl`` says of it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch import Tensor

from vidreason.cli import lightning
from vidreason.cli.finished_run import FinishedStage, find_stage
from vidreason.cli.pipeline_commands import quietly
from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.inference_data import INFERENCE_SPLIT, InferenceDataModule, KnownClips
from vidreason.datamodules.task import Task
from vidreason.datamodules.types import Clip, VideoBatch
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.own_traces import TRACES_FILE
from vidreason.lightning_modules.predictions import Decisions

Video = str | os.PathLike[str] | np.ndarray | Tensor


@dataclass(frozen=True)
class Decision:
    """What the model says about one clip."""

    video: str
    """Path of the file, or ``frames 0``, ``frames 1`` ... for frames in memory"""
    label: str | None
    """None where the clip could not be read, or no answer could be parsed"""
    probs: Mapping[str, float]
    """Calibrated probability of every class, in the task's order; empty where the clip could not be read"""
    traces: tuple[str, ...]
    """The completions that the decision rests on; none where the model decides without reasoning"""
    seconds: float
    """Wall time, an even share of what its batch took"""
    error: str | None = None
    """Why the clip could not be read"""


class VideoClassifier:
    """Decides about clips with the model of a finished run.

    Use :meth:`from_run`. Weights are loaded once, a policy and its calibrator as two adapters on one base; each adapter
    encodes a clip once for all its traces and labels.

    Example::

        classify = VideoClassifier.from_run("runs/mine")
        decision = classify("clip.mp4")
        decision.label, decision.probs, decision.traces
    """

    def __init__(self, stage: FinishedStage, batch_size: int = 8) -> None:
        with quietly():
            cli = lightning.build("test", [*stage.options, "--run_dir", tempfile.mkdtemp(prefix="vidreason-")])
        atexit.register(shutil.rmtree, cli.run_dir, ignore_errors=True)
        if not isinstance(cli.model, VLMModule) or not isinstance(cli.datamodule, VideoDataModule):
            raise ValueError(f"{stage.folder}: {type(cli.model).__name__} is no stage that decides about clips")
        self._module, self._trainer = cli.model, cli.trainer
        self._task, self._known = _task_and_clips(cli.datamodule, stage.task_file)
        self._data = InferenceDataModule(
            self._task, self._module.vlm, cli.datamodule.frames, cli.datamodule.seed, batch_size
        )
        self._defaults = (self._module.samples, self._module.trace_options)
        self._start()

    @classmethod
    def from_run(cls, run: str | os.PathLike[str], stage: str | None = None, batch_size: int = 8) -> VideoClassifier:
        """Loads the model of a run.

        Args:
            run: Run folder of a pipeline, or of a single ``vidreason fit`` or ``test``.
            stage: Stage of the pipeline whose model is asked; by default what its last test stage tested.
            batch_size: Clips decided together.

        Raises:
            ValueError: There is no such run or stage, or it has not finished.
        """
        return cls(find_stage(Path(run), stage), batch_size)

    @property
    def label_names(self) -> tuple[str, ...]:
        """[C] class names."""
        return self._task.label_names

    def __call__(
        self, video: Video | Sequence[Video], traces: int | None = None, fps: float | None = None
    ) -> Decision | list[Decision]:
        """Decides about one clip, or about several.

        Args:
            video: A path, or frames [T, H, W, 3] uint8; or a list of such.
            traces: Traces per clip (K); None takes the run's.
            fps: Frames per second of frames in memory.

        Returns:
            A decision; for a list, a list.

        Raises:
            ValueError: Frames have another shape or type, or come without ``fps``; ``traces`` is below 1.
        """
        single = isinstance(video, str | os.PathLike | np.ndarray | Tensor)
        videos: Sequence[Video] = [video] if single else list(video)  # type: ignore[list-item,arg-type]
        decisions = list(self.decide(videos, traces, fps))
        return decisions[0] if single else decisions

    def decide(
        self, videos: Sequence[Video], traces: int | None = None, fps: float | None = None
    ) -> Iterator[Decision]:
        """As calling it with a list, one decision after the other as they are made, in the order of ``videos``."""
        if traces is not None and traces < 1:
            raise ValueError(f"traces must be at least 1, got {traces}")
        samples, options = self._defaults
        self._module.samples = traces or samples
        self._module.trace_options = replace(options, samples=traces or options.samples)
        size = self._data.batch_size
        for first in range(0, len(videos), size):
            yield from self._decide_batch(videos[first : first + size], first, fps)

    def _start(self) -> None:
        """Stands in for the trainer's start of a test: views, weights, device, precision."""
        trainer, module = self._trainer, self._module
        trainer.datamodule = self._data  # type: ignore[attr-defined]
        trainer.state.fn, trainer.state.stage = TrainerFn.TESTING, RunningStage.TESTING
        self._data.trainer = trainer
        module.trainer = trainer
        self._data.setup("test")
        module.setup("test")
        device = trainer.strategy.root_device
        with torch.inference_mode(), quietly():
            module.configure_model()
            if next(module.policy.parameters()).device != device:
                module.to(device)
        module.eval()

    def _decide_batch(self, videos: Sequence[Video], first: int, fps: float | None) -> Iterator[Decision]:
        start = time.perf_counter()
        names, clips, in_memory = [], [], {}
        for number, video in enumerate(videos, start=first):
            if isinstance(video, str | os.PathLike):
                names.append(os.fspath(video))
                known = self._known.find(Path(video))
                clips.append(
                    Clip(Path(video), None, names[-1])
                    if known is None
                    else replace(known, path=Path(video), label=None, split=INFERENCE_SPLIT)
                )
            else:
                names.append(f"frames {number}")
                in_memory[names[-1]] = _frames(video, fps, names[-1])
                clips.append(Clip(Path(names[-1]), None, names[-1]))
        found: dict[str, tuple[Decisions, int] | str] = {}
        unique = list({clip.video_id: clip for clip in clips}.values())
        self._data.set_clips(unique, in_memory)
        (self._module.run_dir / TRACES_FILE).unlink(missing_ok=True)
        with torch.inference_mode(), self._module.forward_context(), quietly():
            self._module.prepare_views()
            for batch in self._data.test_dataloader()[0]:
                found |= self._decide(batch)
        seconds = (time.perf_counter() - start) / len(videos)
        for name, clip in zip(names, clips, strict=True):
            yield self._decision(name, found[clip.video_id], seconds)

    def _decide(self, batch: VideoBatch) -> dict[str, tuple[Decisions, int] | str]:
        """Decisions by video id with their row in it, or the reason why there is none."""
        failed: dict[str, tuple[Decisions, int] | str] = {f.clip.video_id: f.error for f in batch.failed}
        if not len(batch):
            return failed
        decisions = self._module.decide_batch(batch.to(self._module.device))
        return failed | {clip.video_id: (decisions, row) for row, clip in enumerate(batch.clips)}

    def _decision(self, name: str, found: tuple[Decisions, int] | str, seconds: float) -> Decision:
        if isinstance(found, str):
            return Decision(name, None, {}, (), seconds, found)
        decisions, row = found
        chosen = int(decisions.pred[row])
        probs = dict(zip(self.label_names, decisions.probs[row].tolist(), strict=True))
        texts = tuple(trace.text for trace in decisions.traces[row])
        return Decision(name, self.label_names[chosen] if chosen >= 0 else None, probs, texts, seconds)


def _task_and_clips(data: VideoDataModule, saved_task: Path) -> tuple[Task, KnownClips]:
    """The run's task, and its data set's clips; where the data set has gone, the task as the run folder keeps it."""
    try:
        data.setup("test")
        return data.task, KnownClips(clip for split in data.splits() for clip in data.clips(split))
    except (ValueError, OSError):
        if not saved_task.is_file():
            raise
        return Task.from_yaml(saved_task), KnownClips(())


def _frames(video: np.ndarray | Tensor, fps: float | None, name: str) -> tuple[Tensor, float]:
    """[T, H, W, 3] uint8 to [T, 3, H, W], with its frames per second."""
    frames = torch.as_tensor(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8 or not len(frames):
        raise ValueError(f"{name}: frames must be [T, H, W, 3] uint8, got {list(frames.shape)} {frames.dtype}")
    if fps is None or not fps > 0:
        raise ValueError(f"{name}: give the frames per second of frames in memory: fps=25.0")
    return frames.permute(0, 3, 1, 2), float(fps)
