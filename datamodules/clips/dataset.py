"""The dataset of clips: each is decoded and joined with its prompt and texts."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from vidreason.datamodules.clips.decoded import DecodedVideo, DecodeError
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.decord_reader import decord
from vidreason.datamodules.clips.placeholder_video import blackened, placeholder_video, shuffled
from vidreason.datamodules.clips.reading import content_of, read_frames
from vidreason.datamodules.clips.time_limit import ReadStoppedError, ReadTimeoutError
from vidreason.datamodules.known import KnowsVideos, not_decoded
from vidreason.datamodules.prompts import ClipView
from vidreason.datamodules.splits import first_five
from vidreason.datamodules.types import Clip, Example, FailedClip, KnownVideo, VideoSample

_LOG = logging.getLogger(__name__)
_MOST_TIMEOUTS = 2


class ClipKey(NamedTuple):
    """Index into a ``ClipDataset``: a clip, and the epoch on which its jitter depends."""

    position: int
    epoch: int
    valid: bool = True
    """False for a clip that only gives this rank as many clips as the others have; it does not count."""
    known: KnownVideo | None = None
    """The processor's outputs for the clip, without pixels, if the vision cache holds its embeddings: the clip is then
    not decoded. None decodes it."""


@dataclass(frozen=True)
class LoadedClip:
    """One item of the dataset, or the reason why the clip could not be read."""

    content: Example | None
    """None if the clip could not be read in evaluation; in training it is a placeholder video then."""
    decode_ms: float
    valid: bool = True
    """False for a clip that only gives this rank as many clips as the others have."""
    failed: FailedClip | None = None
    """The reason why the clip could not be read."""


class ClipDataset(Dataset[LoadedClip]):
    """A dataset of decoded clips with the prompts and texts of a view.

    Args:
        clips: The clips.
        view: Defines the prompt and texts of a clip.
        frames: Options of the sampled frames.
        seed: Seed of the jitter in training.
        train: If True, segment sampling is jittered, and a clip that cannot be read becomes a placeholder video that
            does not count, since every rank has to run its part of a batch.
    """

    def __init__(self, clips: Sequence[Clip], view: ClipView, frames: FrameOptions, seed: int, train: bool) -> None:
        self.clips = tuple(clips)
        self.view = view
        self.frames = frames
        self.seed = seed
        self.train = train
        self.knows: KnowsVideos | None = None
        """Tells in the main process which clips need not be decoded; None decodes all."""
        self._timeouts: Counter[Path] = Counter()

    def __len__(self) -> int:
        return len(self.clips)

    def __getstate__(self) -> dict[str, object]:
        """Leaves ``knows`` in the main process."""
        return self.__dict__ | {"knows": None}

    def key(self, position: int, epoch: int, valid: bool) -> ClipKey:
        """Returns the index of a clip; samplers call this in the main process."""
        return ClipKey(position, epoch, valid, self._known(self.clips[position]))

    def __getitem__(self, key: int | ClipKey) -> LoadedClip:
        """Returns a clip with prompt and texts, or the reason why it cannot be read."""
        position, epoch, valid, known = key if isinstance(key, ClipKey) else ClipKey(key, 0)
        clip = self.clips[position]
        if known is not None:
            return LoadedClip(
                Example(not_decoded(clip, known), self.view.prompt(clip), self.view.texts(clip)), 0.0, valid
            )
        start = time.perf_counter()
        failed = None
        try:
            sample = self._sample(clip, self._jitter(clip, epoch) if self.train else None)
        except (DecodeError, OSError) as error:
            stopped = isinstance(error, ReadStoppedError)
            sample, failed = placeholder_video(clip, self.frames), FailedClip(clip, str(error), stopped)
        decode_ms = 1000 * (time.perf_counter() - start)
        if failed is not None and not self.train:
            return LoadedClip(None, decode_ms, valid, failed)
        return LoadedClip(self._shown(sample), decode_ms, valid, failed)

    def _shown(self, sample: VideoSample) -> Example:
        return Example(sample, self.view.prompt(sample.clip), self.view.texts(sample.clip))

    def _sample(self, clip: Clip, jitter: torch.Generator | None) -> VideoSample:
        """Returns the frames that the view shows of a clip.

        Raises:
            DecodeError: If no frame can be read.
            OSError: If the file cannot be opened.
        """
        video = self.read(clip, jitter)
        frames = shuffled(video.frames, clip.video_id) if self.frames.probe == "shuffled" else video.frames
        sample = VideoSample(clip.video_id, frames, clip.label, video.timing, clip)
        if not self.view.shows_video or self.frames.probe == "black":
            return blackened(sample)
        return replace(sample, identity=self._identity(clip))

    def _known(self, clip: Clip) -> KnownVideo | None:
        """Returns what the prompt needs of a clip whose embeddings are known."""
        knows = self.knows
        hidden = not self.view.shows_video or self.frames.probe == "black"
        if knows is None or not knows.knows_videos or hidden or self._timeouts[clip.path]:
            return None
        try:
            video = self._identity(clip)
        except (DecodeError, OSError) as error:  # the worker, which tries again, says why
            self._timeouts[clip.path] += isinstance(error, ReadTimeoutError)
            return None
        return knows.find_known(video, self.view.prompt(clip), partial(self._sample, clip, None)) if video else None

    def read(self, clip: Clip, jitter: torch.Generator | None) -> DecodedVideo:
        """Returns the frames of a clip, read from its file; a file that took too long twice is not tried again.

        Raises:
            DecodeError: If no frame can be read within the time limit.
        """
        if self._timeouts[clip.path] >= _MOST_TIMEOUTS:
            raise DecodeError(f"{clip.path}: not read within {self.frames.timeout:g} seconds, twice")
        try:
            return read_frames(clip.path, self.frames, jitter, clip.stretch)
        except ReadTimeoutError:
            self._timeouts[clip.path] += 1
            raise

    def content(self, clip: Clip) -> str:
        """Returns the hash of the file; empty if there is none.

        Raises:
            DecodeError: If it cannot be read within the time limit.
        """
        return content_of(clip.path, self.frames)

    def _identity(self, clip: Clip) -> str:
        """Returns the ``VideoSample.identity``: a hash of the file and of how frames are taken; empty if at random.

        Raises:
            DecodeError: If the file cannot be read within the time limit.
        """
        jittered = self.train and self.frames.sampling == "segment"
        content = "" if jittered else self.content(clip)
        if not content:
            return ""
        library = "pyav" if decord() is None else "decord"
        return hashlib.sha256(f"{content} {clip.stretch} {library} {self.frames}".encode()).hexdigest()

    def _jitter(self, clip: Clip, epoch: int) -> torch.Generator:
        """Returns a generator that depends on seed, epoch and clip only, not on workers or resuming."""
        digest = hashlib.blake2b(f"{self.seed}/{epoch}/{clip.video_id}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def clips_with_target(split: str, clips: Sequence[Clip], view: ClipView) -> tuple[Clip, ...]:
    """Returns the clips that have a target in a view; the others are left out with a warning.

    Raises:
        ValueError: If no clip has one.
    """
    kept = tuple(clip for clip in clips if view.keep(clip))
    if len(kept) < len(clips):
        left_out = first_five([clip.video_id for clip in clips if not view.keep(clip)])
        _LOG.warning(
            "%s: %d of %d clips have no target and are left out: %s",
            split,
            len(clips) - len(kept),
            len(clips),
            left_out,
        )
    if not kept:
        raise ValueError(f"no clip of split {split!r} has a target to train on")
    return kept
