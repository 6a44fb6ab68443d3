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

from vidreason.answering.asked import Asked, Video, named, rounds_of
from vidreason.answering.exported import load_export
from vidreason.answering.loaded import LoadedModel, OpenedRun
from vidreason.answering.settings import settings_of
from vidreason.config.finished_stage import find_stage
from vidreason.config.quiet import quietly
from vidreason.datamodules.clips.mounts import Lookout
from vidreason.datamodules.clips.read_ahead import Readers, usual_readers
from vidreason.datamodules.clips.time_limit import ReadTimeoutError
from vidreason.datamodules.inference_data import INFERENCE_SPLIT, InferenceDataModule, ReadClip
from vidreason.datamodules.sources.listing import ListedClip
from vidreason.datamodules.traces import TraceRecord
from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_modules.decisions.deciders import ReviewDecider, decide_in_pieces
from vidreason.lightning_modules.decisions.predictions import BatchDecisions
from vidreason.lightning_modules.decisions.threshold import Threshold
from vidreason.lightning_modules.traces.generation import TraceGenerator
from vidreason.lightning_modules.weights.answering import Answering


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
    """Wall time in seconds: the time since the batch before it, divided by the clips of the batch."""
    error: str | None = None
    """The reason why the clip could not be read; None if it was read."""
    abstained: bool = False
    """Whether the confidence is below the threshold of ``vidreason threshold``; ``label`` is None then, and ``probs``
    are given all the same."""
    unanswered: bool = False
    """Whether the file system of the clip did not answer, so that ``error`` says nothing about the clip itself."""


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
        self._loaded, self._answering, self._task = loaded, loaded.answering, loaded.task
        self._find_known, self._fabric = loaded.find_known, loaded.fabric
        self._readers = Readers(usual_readers() if readers is None else readers)
        self.answers, self.threshold = loaded.answers, loaded.threshold
        self._data = InferenceDataModule(self._task, self._answering.vlm, loaded.frames, loaded.seed, batch_size)

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
        lookout, size = Lookout(), self._data.batch_size

        def read(asked: Asked) -> tuple[str, ReadClip]:
            return asked.name, self._read(asked, lookout)

        with closing(self._readers.ahead(named(videos, fps), read, 2 * size)) as reading:
            start = time.perf_counter()
            while batch := list(islice(reading, size)):
                yield from self._decide_batch(batch, traces, start)
                start = time.perf_counter()

    def _decide_batch(
        self, batch: Sequence[tuple[str, ReadClip]], traces: int | None, start: float
    ) -> Iterator[Decision]:
        rounds, round_of = rounds_of([read for _, read in batch])
        found = []
        for clips in rounds:
            self._data.set_clips(clips.values())
            with torch.inference_mode(), self._fabric.autocast(), quietly():
                found.append(self._decide_all(traces))
        seconds = (time.perf_counter() - start) / len(batch)
        # A threshold holds for the number of traces that it was fitted with.
        threshold = self.threshold if self.threshold is None or traces in (None, self.threshold.samples) else None
        for (name, read), number in zip(batch, round_of, strict=True):
            decision = self._decision(name, found[number][read.clip.video_id], seconds, threshold)
            yield replace(decision, unanswered=True) if read.unanswered else decision

    def _read(self, asked: Asked, lookout: Lookout) -> ReadClip:
        """Reads a clip; several threads call this."""
        clip = asked.clip
        if asked.frames is not None:
            return self._data.take(clip, *asked.frames)
        try:
            lookout.look(clip.path)
        except ReadTimeoutError as error:
            return ReadClip(clip, error=str(error), unanswered=True)
        except OSError:
            pass  # reading says why
        # The id matters because the random numbers of sampling depend on it.
        known = self._find_known(clip.path) if clip.stretch is None else None
        if known is not None:
            fields = {**known.fields, **clip.fields}
            clip = replace(clip, video_id=known.video_id, group=known.group, fields=fields)
        return self._data.read(clip)

    def _decide_all(self, samples: int | None) -> dict[str, tuple[BatchDecisions, int] | str]:
        """Returns (decisions of the batch, row of the clip) by video id, or the error of an unreadable clip."""
        answering = self._answering.with_samples(samples)
        decider = answering.decider
        if isinstance(decider, ReviewDecider) and answering.generator is not None:
            decider = replace(decider, traces=self._traces(answering, answering.generator))
        found: dict[str, tuple[BatchDecisions, int] | str] = {}
        batches: Iterator[VideoBatch] = iter(self._data.loader(INFERENCE_SPLIT, decider.view))
        for batch in batches:
            found |= {failed.clip.video_id: failed.error for failed in batch.failed}
            if len(batch):
                batch, size = batch.to(self._fabric.device), answering.clips_per_forward
                decisions = decide_in_pieces(decider, answering.vlm, answering.model, batch, size)
                found |= {clip.video_id: (decisions, row) for row, clip in enumerate(batch.clips)}
        return found

    def _traces(self, answering: Answering, generator: TraceGenerator) -> dict[str, list[TraceRecord]]:
        """Returns newly generated traces of the current clips by video id."""
        traces: dict[str, list[TraceRecord]] = {}
        for batch in self._data.loader(INFERENCE_SPLIT, generator.view):
            for record in generator.records(answering.writer, batch.to(self._fabric.device), self.label_names):
                traces.setdefault(record.video_id, []).append(record)
        return traces

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
