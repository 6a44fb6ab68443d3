"""The dataset of clips: each is decoded and joined with its prompt and texts."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from vidreason.datamodules.clips.decoded import DecodedVideo, DecodeError
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.placeholder_video import blackened, placeholder_video, shuffled
from vidreason.datamodules.clips.reading import ReadStoppedError, ReadTimeoutError, call_reader, read_frames
from vidreason.datamodules.file_hash import content_sha, file_version
from vidreason.datamodules.prompts import ClipView
from vidreason.datamodules.types import Clip, Example, FailedClip, VideoSample
from vidreason.signals import use_stop_pipe

_MOST_TIMEOUTS = 2


class ClipKey(NamedTuple):
    """Index into a ``ClipDataset``: a clip, and the epoch on which its jitter depends."""

    position: int
    epoch: int
    valid: bool = True
    """False for a clip that only gives this rank as many clips as the others have; it does not count."""


@dataclass(frozen=True)
class LoadedClip:
    """One item of the dataset, or the reason why the clip could not be read."""

    content: Example | None
    """None if the clip could not be read in evaluation; in training it is a placeholder video then."""
    decode_ms: float
    valid: bool = True
    """False for a clip that only gives this rank as many clips as the others have."""
    failed: FailedClip | None = None
    """Why the clip could not be read."""


def ignore_signals_in_worker(worker: int, stop: Connection | None = None) -> None:
    """Makes a worker ignore Ctrl-C and SIGTERM to the process group, so that only its parent process ends it.

    Args:
        worker: Number of the worker, which a ``worker_init_fn`` receives.
        stop: ``signals.stop_pipe()`` of the parent process, which ends a read when the parent receives a signal.
    """
    if stop is not None:
        use_stop_pipe(stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        # a blocked signal is only delivered to sigwaitinfo, which tells who sent it
        threading.Thread(target=_exit_on_sigterm_of_parent, daemon=True).start()


def _exit_on_sigterm_of_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


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
        self._contents: dict[tuple[str, str], str] = {}
        self._timeouts: Counter[Path] = Counter()

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: int | ClipKey) -> LoadedClip:
        """Returns a clip with prompt and texts, or the reason why it cannot be read."""
        position, epoch, valid = key if isinstance(key, ClipKey) else ClipKey(key, 0)
        clip = self.clips[position]
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
        return LoadedClip(Example(sample, self.view.prompt(clip), self.view.texts(clip)), decode_ms, valid, failed)

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
        return replace(sample, identity=self._identity(clip, video))

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
        try:
            key = (str(clip.path), file_version(clip.path))  # a file that was replaced is hashed again
        except OSError:
            return ""
        if key not in self._contents:
            self._contents[key] = call_reader(content_sha, clip.path, timeout=self.frames.timeout)
        return self._contents[key]

    def _identity(self, clip: Clip, video: DecodedVideo) -> str:
        """Returns the ``VideoSample.identity``: a hash of the file and the frames taken; empty if these are random."""
        jittered = self.train and self.frames.sampling == "segment"
        content = "" if jittered else self.content(clip)
        if not content:
            return ""
        taken = (
            f"{content} {clip.stretch} {video.timing.indices} {tuple(video.frames.shape)} {video.reader} {self.frames}"
        )
        return hashlib.sha256(taken.encode()).hexdigest()

    def _jitter(self, clip: Clip, epoch: int) -> torch.Generator:
        """Returns a generator that depends on seed, epoch and clip only, not on workers or resuming."""
        digest = hashlib.blake2b(f"{self.seed}/{epoch}/{clip.video_id}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
