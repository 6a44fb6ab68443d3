"""Data for inference: clips without labels, read from files or held in memory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.clips.dataset import ClipDataset
from vidreason.datamodules.clips.decoded import DecodedVideo, DecodeError
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.reading import read_frames, take_frames
from vidreason.datamodules.clips.time_limit import (
    ReadStoppedError,
    ReadTimeoutError,
    call_for_files,
    call_reader,
    look_at,
)
from vidreason.datamodules.file_hash import content_sha, file_size
from vidreason.datamodules.prompts import ClipView
from vidreason.datamodules.task import Task
from vidreason.datamodules.types import BatchEncoder, Clip
from vidreason.datamodules.words import check_words

_LOG = logging.getLogger(__name__)
INFERENCE_SPLIT = "inference"
"""The only split of an ``InferenceDataModule``."""


@dataclass(frozen=True)
class ReadClip:
    """A clip with its frames, or the reason why it could not be read."""

    clip: Clip
    video: DecodedVideo | None = None
    content: str = ""
    """Hash of the file, or of all frames of a clip in memory; empty if it is not known."""
    error: str | None = None
    unanswered: bool = False
    """True if the file system of the clip did not answer in time; ``error`` then says nothing about the clip itself."""


class InferenceDataModule(VideoDataModule):
    """A data module with one test split, whose clips were read and are replaced for each call.

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
        self._given: dict[str, ReadClip] = {}

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
        return tuple(read.clip for read in self._given.values()) if split == INFERENCE_SPLIT else ()

    def setup(self, stage: str) -> None:
        """Uses the clips as they are; no splits are made.

        Raises:
            ValueError: If the task or the metadata of a clip contains a special token of the model.
        """
        check_words(self._task, (read.clip for read in self._given.values() if read.error is None), self.encoder)
        self._clips = {INFERENCE_SPLIT: tuple(self.samples(INFERENCE_SPLIT))}

    def set_clips(self, clips: Iterable[ReadClip]) -> None:
        """Replaces the clips, whose ids have to differ: of clips with one id only the last would be kept."""
        given = {read.clip.video_id: read for read in clips}
        # In place: whoever still holds a dataset of earlier clips does not hold their frames.
        self._given.clear()
        self._given.update(given)
        self.setup("test")

    def read(self, clip: Clip) -> ReadClip:
        """Reads a clip from its file; several threads may call this.

        A clip whose file cannot be read, or whose metadata contains a special token of the model, has an error.
        """
        try:
            check_words(self._task, (clip,), self.encoder)
            video = read_frames(clip.path, self.frames, None, clip.stretch)
        except ReadStoppedError:
            raise
        except ReadTimeoutError as error:
            return ReadClip(clip, error=str(error), unanswered=not _answers(clip.path))
        except (DecodeError, OSError, ValueError) as error:
            return ReadClip(clip, error=str(error))
        try:
            content = call_reader(content_sha, clip.path, timeout=self.frames.timeout)
        except (DecodeError, OSError):  # hours of video on a slow network disk: nothing about it is cached
            content = ""
        return ReadClip(clip, video, content)

    def take(self, clip: Clip, frames: Tensor, fps: float) -> ReadClip:
        """Takes frames of a clip that is in memory, as they are taken from a file.

        Args:
            clip: The clip.
            frames: [T, 3, H, W] uint8, all frames.
            fps: Frames per second.
        """
        # All frames and not only the sampled ones are hashed, as those of a file are.
        return ReadClip(clip, take_frames(frames, fps, self.frames), _digest(frames, fps))

    def hold(self, clip: Clip, video: DecodedVideo) -> ReadClip:
        """Returns a clip with frames that have been taken from it already."""
        return ReadClip(clip, video, _digest(video.frames, video.timing))

    def dataset(self, clips: Sequence[Clip], view: ClipView, train: bool) -> ClipDataset:
        """Returns a dataset of the clips that were read."""
        return _ReadDataset(clips, view, self.frames, self.seed, self._given)


def _digest(frames: Tensor, times: object) -> str:
    """Returns a hash of frames [T, 3, H, W] uint8 and what is known about their times."""
    digest = hashlib.sha256(f"{tuple(frames.shape)} {times} ".encode())
    digest.update(frames.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _answers(path: Path) -> bool:
    """Returns whether the file system of a clip that took too long to read answers at all."""
    try:
        look_at(path)
    except ReadTimeoutError:
        return False
    except (DecodeError, OSError):
        pass
    return True


class _ReadDataset(ClipDataset):
    def __init__(
        self, clips: Sequence[Clip], view: ClipView, frames: FrameOptions, seed: int, given: Mapping[str, ReadClip]
    ) -> None:
        super().__init__(clips, view, frames, seed, train=False)
        self.given = given

    def read(self, clip: Clip, jitter: torch.Generator | None) -> DecodedVideo:
        """Returns the frames of a clip.

        Raises:
            DecodeError: If it could not be read.
        """
        found = self.given[clip.video_id]
        if found.video is None:
            raise DecodeError(found.error or f"{clip.path}: not read")
        return found.video

    def content(self, clip: Clip) -> str:
        """Returns the hash of a clip's content."""
        return self.given[clip.video_id].content


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
