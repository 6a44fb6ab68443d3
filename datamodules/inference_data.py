"""Data for inference: clips without labels, read from files or held in memory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.clips.dataset import ClipDataset
from vidreason.datamodules.clips.decoded import DecodedVideo, DecodeError
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.reading import take_frames
from vidreason.datamodules.clips.time_limit import ReadTimeoutError, call_for_files, call_reader
from vidreason.datamodules.file_hash import content_sha, file_size
from vidreason.datamodules.prompts import ClipView
from vidreason.datamodules.task import Task
from vidreason.datamodules.types import BatchEncoder, Clip
from vidreason.datamodules.words import check_words

_LOG = logging.getLogger(__name__)
INFERENCE_SPLIT = "inference"
"""The only split of an ``InferenceDataModule``."""
InMemory = tuple[Tensor, float] | DecodedVideo
"""All frames [T, 3, H, W] uint8 of a video with its frames per second, or the frames that were taken from one."""


class InferenceDataModule(VideoDataModule):
    """A data module with one test split, whose clips are replaced for each call.

    Args:
        task: Classes and prompts.
        encoder: The model family.
        frames: Options of the frames that are taken; the same as in training. Nothing is written to their cache.
        seed: Seed of the run that trained the model.
        batch_size: Clips per batch.
    """

    def __init__(self, task: Task, encoder: BatchEncoder, frames: FrameOptions, seed: int, batch_size: int) -> None:
        super().__init__(encoder, replace(frames, cache=None), batch_size, seed=seed, test_splits=(INFERENCE_SPLIT,))
        self._task = task
        self._given: tuple[Clip, ...] = ()
        self._in_memory: dict[str, InMemory] = {}

    @property
    def label_names(self) -> tuple[str, ...]:
        """[C] class names of the task."""
        return self._task.label_names

    @property
    def task(self) -> Task:
        """Classes and prompts."""
        return self._task

    def splits(self) -> tuple[str, ...]:
        """Returns the name of the only split."""
        return (INFERENCE_SPLIT,)

    def samples(self, split: str) -> Sequence[Clip]:
        """Returns the current clips."""
        return self._given if split == INFERENCE_SPLIT else ()

    def setup(self, stage: str) -> None:
        """Uses the clips as they are; no splits are made.

        Raises:
            ValueError: If the task or a clip's metadata contains a special token of the model.
        """
        check_words(self._task, self._given, self.encoder)
        self._clips = {INFERENCE_SPLIT: self._given}

    def set_clips(self, clips: Sequence[Clip], in_memory: Mapping[str, InMemory]) -> None:
        """Replaces the clips.

        Args:
            clips: The next clips.
            in_memory: Frames by video id, of clips that are not read from their files.
        """
        self._given = tuple(clips)
        self._in_memory = dict(in_memory)
        self.setup("test")

    def dataset(self, clips: Sequence[Clip], view: ClipView, train: bool) -> ClipDataset:
        """Returns a dataset that reads frames from memory or from files."""
        return _InferenceDataset(clips, view, self.frames, self.seed, self._in_memory)


class _InferenceDataset(ClipDataset):
    def __init__(
        self,
        clips: Sequence[Clip],
        view: ClipView,
        frames: FrameOptions,
        seed: int,
        in_memory: Mapping[str, InMemory],
    ) -> None:
        super().__init__(clips, view, frames, seed, train=False)
        self.in_memory = in_memory

    def read(self, clip: Clip, jitter: torch.Generator | None) -> DecodedVideo:
        """Returns the frames of a clip, from memory if it is there."""
        found = self.in_memory.get(clip.video_id)
        if found is None:
            return super().read(clip, jitter)
        return found if isinstance(found, DecodedVideo) else take_frames(*found, self.frames)

    def content(self, clip: Clip) -> str:
        """Returns a hash of the file, or of all frames in memory of a clip."""
        found = self.in_memory.get(clip.video_id)
        if found is None:
            return super().content(clip)
        # All frames and not only the sampled ones, as for a file.
        frames, times = (found.frames, found.timing) if isinstance(found, DecodedVideo) else found
        digest = hashlib.sha256(f"{tuple(frames.shape)} {times} ".encode())
        digest.update(frames.contiguous().numpy().tobytes())
        return digest.hexdigest()


class KnownClips:
    """Finds the clip of a data set that has the content of a file, so that the file gets the id of that clip.

    Args:
        clips: The clips of the data set.
        timeout: Seconds that reading one file may take; None sets no limit.
    """

    def __init__(self, clips: Iterable[Clip], timeout: float | None = None) -> None:
        self.timeout = timeout
        self._by_size: dict[int, list[Clip]] = {}
        whole = [clip for clip in clips if clip.stretch is None]
        try:
            for clip, size in zip(whole, call_for_files(file_size, [c.path for c in whole], timeout), strict=True):
                if size is not None:
                    self._by_size.setdefault(size, []).append(clip)
        except ReadTimeoutError as error:
            _LOG.warning("%s; clips of the data set are not all recognised", error)
        self._digests: dict[Path, str] = {}

    def find(self, path: Path) -> Clip | None:
        """Returns the clip with the same bytes, or None. Only files of the same size are read."""
        try:
            size = call_reader(file_size, path, timeout=self.timeout)
        except (DecodeError, OSError):
            return None
        alike = () if size is None else self._by_size.get(size, ())
        digest = self._sha(path) if alike else ""
        return next((clip for clip in alike if digest and self._digest(clip.path) == digest), None)

    def _digest(self, path: Path) -> str:
        """Returns the hash of a clip of the data set, computed once."""
        if path not in self._digests:
            self._digests[path] = self._sha(path)
        return self._digests[path]

    def _sha(self, path: Path) -> str:
        """Returns the hash of a file; empty if it cannot be read."""
        try:
            return call_reader(content_sha, path, timeout=self.timeout)
        except (DecodeError, OSError):
            return ""
