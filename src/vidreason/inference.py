"""VideoClassifier: applies the model of a finished run to clips and returns calibrated decisions with their traces.

The model comes from the config of the run or from an exported folder, without a Trainer. It decides with the decider of
the stage: the same prompts, sampling and code as in ``vidreason test``. A clip of the run's data set is recognised by
its content and gets the same decision as in ``predictions.jsonl``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vidreason.answering.deciding import ClipDecider, DecidedClip
from vidreason.answering.exported import load_export
from vidreason.answering.loaded import LoadedModel, OpenedRun
from vidreason.answering.settings import settings_of
from vidreason.config.finished_stage import find_stage
from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.datamodules.clips.mounts import Lookout
from vidreason.datamodules.clips.read_ahead import Readers, usual_readers
from vidreason.datamodules.clips.time_limit import ReadStoppedError, ReadTimeoutError
from vidreason.datamodules.inference_data import INFERENCE_SPLIT, ReadClip
from vidreason.datamodules.sources.listing import ListedClip
from vidreason.datamodules.types import Clip
from vidreason.lightning_modules.decisions.threshold import Threshold

Video = str | os.PathLike[str] | ListedClip | np.ndarray | Tensor


@dataclass(frozen=True)
class Decision:
    """The decision of the model about one clip."""

    video: str
    """Path of the file, or ``frames 0``, ``frames 1`` … for frames in memory."""
    label: str | None
    """None if the clip could not be read, no answer could be parsed, or the classifier abstained."""
    probs: Mapping[str, float]
    """Probability of every class, in the task's order: of a calibration stage temperature-scaled, of several sampled
    answers their shares. Empty if the clip could not be read, or the stage gives a single answer or greedy ones."""
    traces: tuple[str, ...]
    """The completions that the decision is based on; empty if the model decides without reasoning."""
    seconds: float
    """Wall time in seconds: the time since the batch before it, divided by the clips of the batch."""
    error: str | None = None
    """The reason why the clip could not be read; None if it was read."""
    abstained: bool = False
    """True if the confidence is below the threshold of ``vidreason threshold``. Then ``label`` is None; ``probs`` is
    given."""
    unanswered: bool = False
    """True if the file system of the clip did not answer in time; the clip itself may be sound."""


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

    def __init__(self, loaded: LoadedModel, batch_size: int = 8, readers: int | None = None) -> None:
        self._loaded, self._task, self._find_known = loaded, loaded.task, loaded.find_known
        self._decider, self._batch_size = ClipDecider(loaded, batch_size), batch_size
        self._readers = Readers(usual_readers() if readers is None else readers)
        self.answers, self.threshold = loaded.answers, loaded.threshold

    @classmethod
    def from_run(
        cls,
        run: str | os.PathLike[str],
        stage: str | None = None,
        batch_size: int = 8,
        readers: int | None = None,
    ) -> VideoClassifier:
        """Loads the model of a run.

        Args:
            run: Run folder of a pipeline, or of a single ``vidreason fit`` or ``test``.
            stage: Stage of the pipeline whose model is used; by default the one that its last test stage tested.
            batch_size: Number of clips per batch.
            readers: Number of clips that are read at once, ahead of the model; None is one for each CPU, at most 8. 0
                reads a clip when the model waits for it.

        Raises:
            ValueError: If there is no such run or stage, or it has not finished.
        """
        return cls(OpenedRun.of(find_stage(Path(run), stage)).load(), batch_size, readers)

    @classmethod
    def from_export(
        cls,
        folder: str | os.PathLike[str],
        base: str | None = None,
        batch_size: int = 8,
        readers: int | None = None,
    ) -> VideoClassifier:
        """Loads a folder of ``vidreason export``; it needs neither the run nor the data, and no code of theirs.

        Args:
            folder: The folder.
            base: Folder or hub id of the base of an adapter; None takes the one that the folder names.
            batch_size: Number of clips per batch.
            readers: As in :meth:`from_run`.

        Raises:
            ValueError: If the folder is damaged or no export, or the base is another one.
        """
        return cls(load_export(Path(folder), base), batch_size, readers)

    @property
    def label_names(self) -> tuple[str, ...]:
        """[C] class names."""
        return self._task.label_names

    def settings(self, traces: int | None = None) -> dict[str, object]:
        """Returns what decisions with K traces depend on, by name; with the same settings they are the same."""
        return settings_of(self._loaded, traces)

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
        single = isinstance(video, str | os.PathLike | ListedClip | np.ndarray | Tensor)
        videos: Sequence[Video] = [video] if single else list(video)  # type: ignore[list-item,arg-type]
        decisions = list(self.decide(videos, traces, fps))
        return decisions[0] if single else decisions

    def decide(
        self, videos: Iterable[Video], traces: int | None = None, fps: float | None = None
    ) -> Iterator[Decision]:
        """Yields the decisions about clips in order; the next ones are read while the model decides.

        Args:
            videos: Paths, listed clips, or frames [T, H, W, 3] uint8; asked for as they are needed.
            traces: Traces per clip (K); None uses the number of the run.
            fps: Frames per second of frames in memory.

        Raises:
            ValueError: If frames have another shape or type or no ``fps``, or ``traces`` is below 1.
        """
        if traces is not None and traces < 1:
            raise ValueError(f"traces must be at least 1, got {traces}")
        lookout, size = Lookout(), self._batch_size

        def read(asked: _Asked) -> tuple[str, ReadClip]:
            return asked.name, self._read(asked, lookout)

        with closing(self._readers.ahead(_named(videos, fps), read, 2 * size)) as reading:
            start = time.perf_counter()
            while batch := list(islice(reading, size)):
                yield from self._decide_batch(batch, traces, start)
                start = time.perf_counter()

    def _decide_batch(
        self, batch: Sequence[tuple[str, ReadClip]], traces: int | None, start: float
    ) -> Iterator[Decision]:
        found = self._decider.decide([read for _, read in batch], traces)
        seconds = (time.perf_counter() - start) / len(batch)
        # A threshold holds for the number of traces that it was fitted with.
        threshold = self.threshold if self.threshold is None or traces in (None, self.threshold.samples) else None
        for (name, read), decided in zip(batch, found, strict=True):
            decision = self._decision(name, decided, seconds, threshold)
            yield replace(decision, unanswered=True) if read.unanswered else decision

    def _read(self, asked: _Asked, lookout: Lookout) -> ReadClip:
        """Reads a clip; several threads call this."""
        clip = asked.clip
        if asked.frames is not None:
            return self._decider.data.take(clip, *asked.frames)
        try:
            lookout.look(clip.path)
        except ReadTimeoutError as error:
            return ReadClip(clip, error=str(error), unanswered=True)
        except ReadStoppedError:
            raise
        except (DecodeError, OSError):
            pass  # reading says why
        # The id matters because the random numbers of sampling depend on it.
        known = self._find_known(clip.path) if clip.stretch is None else None
        if known is not None:
            fields = {**known.fields, **clip.fields}
            clip = replace(clip, video_id=known.video_id, group=known.group, fields=fields)
        return self._decider.data.read(clip)

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


@dataclass(frozen=True)
class _Asked:
    name: str
    clip: Clip
    frames: tuple[Tensor, float] | None = None
    """Frames [T, 3, H, W] uint8 in memory and their rate; None for a file."""


def _named(videos: Iterable[Video], fps: float | None) -> Iterator[_Asked]:
    """Yields each video as a clip whose id is the path as it was given, or a number for frames in memory."""
    for number, video in enumerate(videos):
        if isinstance(video, ListedClip):
            fields, where = video.fields, video.where
            clip = Clip(video.path, None, video.name, INFERENCE_SPLIT, "", fields, where, video.stretch)
            yield _Asked(video.name, clip)
        elif isinstance(video, str | os.PathLike):
            name = os.fspath(video)
            yield _Asked(name, Clip(Path(name), None, name, INFERENCE_SPLIT))
        else:
            name = f"frames {number}"
            yield _Asked(name, Clip(Path(name), None, name, INFERENCE_SPLIT), _frames(video, fps, name))


def _frames(video: np.ndarray | Tensor, fps: float | None, name: str) -> tuple[Tensor, float]:
    """Returns frames [T, H, W, 3] uint8 as ([T, 3, H, W], frames per second)."""
    frames = torch.as_tensor(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8 or not len(frames):
        raise ValueError(f"{name}: frames must be [T, H, W, 3] uint8, got {list(frames.shape)} {frames.dtype}")
    if fps is None or not fps > 0:
        raise ValueError(f"{name}: give the frames per second of frames in memory: fps=25.0")
    return frames.permute(0, 3, 1, 2), float(fps)
