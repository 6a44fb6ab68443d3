"""VideoClassifier: applies the model of a finished run to clips and returns calibrated decisions with their traces.

The model comes from the config of the run or from an exported folder, without a Trainer. It decides with the decider of
the stage: the same prompts, sampling and code as in ``vidreason test``. A clip of the run's data set is recognised by
its content and gets the same decision as in ``predictions.jsonl``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vidreason.answering.deciding import ClipDecider, DecidedClip
from vidreason.answering.exported import load_export
from vidreason.answering.loaded import LoadedModel, OpenedRun
from vidreason.config.finished_stage import find_stage
from vidreason.datamodules.inference_data import INFERENCE_SPLIT
from vidreason.datamodules.types import Clip
from vidreason.lightning_modules.decisions.threshold import Threshold

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

    Use :meth:`from_run` or :meth:`from_export`; ``answers`` says which stage answers. Weights are loaded once, with a
    policy and its calibrator as two adapters on one base. Each adapter encodes a clip once for all its traces and
    labels.

    Example::

        classify = VideoClassifier.from_run("runs/mine")
        decision = classify("clip.mp4")
        decision.label, decision.probs, decision.traces
    """

    def __init__(self, loaded: LoadedModel, batch_size: int = 8) -> None:
        self._decider, self._batch_size = ClipDecider(loaded, batch_size), batch_size
        self._task, self._find_known = loaded.task, loaded.find_known
        self.answers, self.threshold = loaded.answers, loaded.threshold

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
        return cls(OpenedRun.of(find_stage(Path(run), stage)).load(), batch_size)

    @classmethod
    def from_export(
        cls, folder: str | os.PathLike[str], base: str | None = None, batch_size: int = 8
    ) -> VideoClassifier:
        """Loads a folder of ``vidreason export``; it needs neither the run nor the data, and no code of theirs.

        Args:
            folder: The folder.
            base: Folder or hub id of the base of an adapter; None takes the one that the folder names.
            batch_size: Number of clips per batch.

        Raises:
            ValueError: If the folder is damaged or no export, or the base is another one.
        """
        return cls(load_export(Path(folder), base), batch_size)

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
        size = self._batch_size
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
        found = self._decider.decide(list({clip.video_id: clip for clip in clips}.values()), in_memory, traces)
        seconds = (time.perf_counter() - start) / len(videos)
        # A threshold holds for the number of traces that it was fitted with.
        threshold = self.threshold if self.threshold is None or traces in (None, self.threshold.samples) else None
        for name, clip in zip(names, clips, strict=True):
            yield self._decision(name, found[clip.video_id], seconds, threshold)

    def _clip_of(self, path: Path, name: str) -> Clip:
        """Returns the clip of the run's data set that has the same content, or a new clip.

        The id matters because the random numbers of sampling depend on it.
        """
        known = self._find_known(path)
        return Clip(path, None, name) if known is None else replace(known, path=path, label=None, split=INFERENCE_SPLIT)

    def _decision(self, name: str, found: DecidedClip | str, seconds: float, threshold: Threshold | None) -> Decision:
        if isinstance(found, str):
            return Decision(name, None, {}, (), seconds, found)
        decisions, row = found.decisions, found.row
        chosen = int(decisions.pred[row])
        probs = decisions.probabilities(row, self.label_names)
        texts = tuple(trace.text for trace in decisions.traces[row])
        abstained = threshold is not None and not threshold.accepts(found.unscaled)
        label = self.label_names[chosen] if chosen >= 0 and not abstained else None
        return Decision(name, label, probs, texts, seconds, abstained=abstained)


def _frames(video: np.ndarray | Tensor, fps: float | None, name: str) -> tuple[Tensor, float]:
    """Returns frames [T, H, W, 3] uint8 as ([T, 3, H, W], frames per second)."""
    frames = torch.as_tensor(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8 or not len(frames):
        raise ValueError(f"{name}: frames must be [T, H, W, 3] uint8, got {list(frames.shape)} {frames.dtype}")
    if fps is None or not fps > 0:
        raise ValueError(f"{name}: give the frames per second of frames in memory: fps=25.0")
    return frames.permute(0, 3, 1, 2), float(fps)
