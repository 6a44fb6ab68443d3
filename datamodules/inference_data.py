"""Clips that a trained model is asked about: files or frames in memory, of any number, without labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.clips.dataset import ClipDataset
from vidreason.datamodules.clips.decoded import DecodedVideo
from vidreason.datamodules.clips.decoding import FrameOptions, take_frames
from vidreason.datamodules.file_hash import content_sha
from vidreason.datamodules.prompts import ClipView
from vidreason.datamodules.task import Task
from vidreason.datamodules.types import BatchEncoder, Clip

INFERENCE_SPLIT = "inference"
"""The split of the clips that are asked about."""


class InferenceDataModule(VideoDataModule):
    """A data module with one test split, whose clips are set call by call.

    Args:
        task: What is asked.
        encoder: The model family.
        frames: Which frames of a clip are taken, as in training.
        seed: Of the run whose model is asked.
        batch_size: Clips decided together.
    """

    def __init__(self, task: Task, encoder: BatchEncoder, frames: FrameOptions, seed: int, batch_size: int) -> None:
        super().__init__(encoder, frames, batch_size, seed=seed, test_splits=(INFERENCE_SPLIT,))
        self._task = task
        self._given: tuple[Clip, ...] = ()
        self._in_memory: dict[str, tuple[Tensor, float]] = {}

    @property
    def label_names(self) -> tuple[str, ...]:
        """[C] class names of the task."""
        return self._task.label_names

    @property
    def task(self) -> Task:
        """What is asked."""
        return self._task

    def splits(self) -> tuple[str, ...]:
        """The one split."""
        return (INFERENCE_SPLIT,)

    def samples(self, split: str) -> Sequence[Clip]:
        """The clips asked about."""
        return self._given if split == INFERENCE_SPLIT else ()

    def setup(self, stage: str) -> None:
        """Takes the clips as they are: none is set apart for training."""
        self._clips = {INFERENCE_SPLIT: self._given}

    def set_clips(self, clips: Sequence[Clip], in_memory: Mapping[str, tuple[Tensor, float]]) -> None:
        """Replaces the clips.

        Args:
            clips: The next clips.
            in_memory: Frames [T, 3, H, W] uint8 and frames per second, by video id, of the clips that are no files.
        """
        self._given = tuple(clips)
        self._in_memory = dict(in_memory)
        self.setup("test")

    def dataset(self, clips: Sequence[Clip], view: ClipView, train: bool) -> ClipDataset:
        """Reads files, and takes from memory what is there."""
        return _InferenceDataset(clips, view, self.frames, self.seed, self._in_memory)


class _InferenceDataset(ClipDataset):
    def __init__(
        self,
        clips: Sequence[Clip],
        view: ClipView,
        frames: FrameOptions,
        seed: int,
        in_memory: Mapping[str, tuple[Tensor, float]],
    ) -> None:
        super().__init__(clips, view, frames, seed, train=False)
        self.in_memory = in_memory

    def read(self, clip: Clip, jitter: torch.Generator | None) -> DecodedVideo:
        """From memory where the clip is there."""
        if clip.video_id in self.in_memory:
            return take_frames(*self.in_memory[clip.video_id], self.frames)
        return super().read(clip, jitter)

    def content(self, clip: Clip) -> str:
        """Of frames in memory, a hash of them all."""
        if clip.video_id not in self.in_memory:
            return super().content(clip)
        frames = self.in_memory[clip.video_id][0]
        return hashlib.sha256(frames.contiguous().numpy().tobytes()).hexdigest()


class KnownClips:
    """Finds a file among the clips of a data set by its content, so that it is asked about under the id it has there.

    Args:
        clips: The clips of the data set.
    """

    def __init__(self, clips: Iterable[Clip]) -> None:
        self._by_size: dict[int, list[Clip]] = {}
        for clip in clips:
            if clip.path.is_file():
                self._by_size.setdefault(clip.path.stat().st_size, []).append(clip)
        self._digests: dict[Path, str] = {}

    def find(self, path: Path) -> Clip | None:
        """Returns the clip with the same bytes; None where there is none. Reads only files of the same size."""
        alike = self._by_size.get(path.stat().st_size, ()) if path.is_file() else ()
        digest = content_sha(path) if alike else ""
        return next((clip for clip in alike if self._digest(clip.path) == digest), None)

    def _digest(self, path: Path) -> str:
        """Of a clip of the data set, read once."""
        if path not in self._digests:
            self._digests[path] = content_sha(path)
        return self._digests[path]
