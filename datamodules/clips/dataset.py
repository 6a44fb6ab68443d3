"""Clips one at a time: decoded, and joined with what a stage shows of them."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from vidreason.datamodules.clips.decoded import DecodedVideo, DecodeError
from vidreason.datamodules.clips.decoding import FrameOptions, read_frames
from vidreason.datamodules.clips.placeholder_video import blackened, placeholder_video
from vidreason.datamodules.file_hash import content_sha
from vidreason.datamodules.prompts import ClipView
from vidreason.datamodules.types import Clip, Example, FailedClip, VideoSample


class ClipKey(NamedTuple):
    """What the training sampler asks for: a clip, and the epoch that its jitter depends on."""

    position: int
    epoch: int
    valid: bool = True
    """False for a clip that only gives this rank as many clips as the others have; it does not count"""


@dataclass(frozen=True)
class LoadedClip:
    """One clip out of the dataset, or the reason why there is none."""

    content: Example | None
    """None outside of training, where the clip could not be read; in training it is a black video then"""
    decode_ms: float
    valid: bool = True
    """As in ``ClipKey``"""
    failed: FailedClip | None = None
    """Why the clip could not be read"""


def ignore_signals_in_worker(worker: int) -> None:
    """Lets a loader's worker outlive Ctrl-C and SIGTERM that go to all processes of a run; only the run itself ends it.

    Args:
        worker: Its number, as a ``worker_init_fn`` gets it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # it says who sends a signal; not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_of_parent, daemon=True).start()


def _exit_on_sigterm_of_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class ClipDataset(Dataset[LoadedClip]):
    """Clips, decoded one at a time and joined with what the view shows of them.

    Args:
        clips: what to read.
        view: prompt and texts of a clip.
        frames: which frames to take.
        seed: of the jitter in training.
        train: jitters segment sampling, and shows black frames, which get no weight, for a clip that cannot be read:
            ranks that train together all have to run their part of a batch.
    """

    def __init__(self, clips: Sequence[Clip], view: ClipView, frames: FrameOptions, seed: int, train: bool) -> None:
        self.clips = tuple(clips)
        self.view = view
        self.frames = frames
        self.seed = seed
        self.train = train
        self._contents: dict[tuple[str, int, int], str] = {}

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: int | ClipKey) -> LoadedClip:
        """Reads a clip, or says why it cannot be read."""
        position, epoch, valid = key if isinstance(key, ClipKey) else ClipKey(key, 0)
        clip = self.clips[position]
        start = time.perf_counter()
        failed = None
        try:
            sample = self._sample(clip, self._jitter(clip, epoch) if self.train else None)
        except (DecodeError, OSError) as error:
            sample, failed = placeholder_video(clip, self.frames), FailedClip(clip, str(error))
        decode_ms = 1000 * (time.perf_counter() - start)
        if failed is not None and not self.train:
            return LoadedClip(None, decode_ms, valid, failed)
        return LoadedClip(Example(sample, self.view.prompt(clip), self.view.texts(clip)), decode_ms, valid, failed)

    def _sample(self, clip: Clip, jitter: torch.Generator | None) -> VideoSample:
        """The frames that the view shows of a clip.

        Raises:
            DecodeError: No frame can be read.
            OSError: The system refuses to open the file.
        """
        video = self.read(clip, jitter)
        sample = VideoSample(clip.video_id, video.frames, clip.label, video.timing, clip)
        if not self.view.shows_video:
            return blackened(sample)
        return replace(sample, identity=self._identity(clip, video))

    def read(self, clip: Clip, jitter: torch.Generator | None) -> DecodedVideo:
        """Reads the frames of a clip from its file."""
        return read_frames(clip.path, self.frames, jitter)

    def content(self, clip: Clip) -> str:
        """Hash of what the frames are taken from; empty where a clip is no file."""
        try:
            found = clip.path.stat()
        except OSError:
            return ""
        key = (str(clip.path), found.st_mtime_ns, found.st_size)
        if key not in self._contents:
            self._contents[key] = content_sha(clip.path)
        return self._contents[key]

    def _identity(self, clip: Clip, video: DecodedVideo) -> str:
        """As ``VideoSample.identity``."""
        jittered = self.train and self.frames.sampling == "segment"
        content = "" if jittered else self.content(clip)
        if not content:
            return ""
        taken = f"{content} {video.timing.indices} {tuple(video.frames.shape)} {video.reader} {self.frames}"
        return hashlib.sha256(taken.encode()).hexdigest()

    def _jitter(self, clip: Clip, epoch: int) -> torch.Generator:
        """A generator of its own for each seed, epoch and clip, so that workers and resuming change nothing."""
        digest = hashlib.blake2b(f"{self.seed}/{epoch}/{clip.video_id}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
