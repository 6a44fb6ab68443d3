"""Videos whose embeddings are known, so that they need not be decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from numpy.typing import NDArray

from vidreason.datamodules.types import Clip, FrameTiming, Prompt, VideoSample


@dataclass(frozen=True)
class KnownVideo:
    """What a prompt needs of a video whose embeddings are known: everything that the processor made except pixels.

    It holds NumPy arrays, which go through the queues of a loader by value: each tensor would take a file descriptor.
    """

    video: str
    """``VideoSample.identity``."""
    shape: tuple[int, ...]
    """Shape of ``VideoSample.frames``."""
    timing: FrameTiming
    per_token: Mapping[str, NDArray[Any]]
    """[1, K] inputs with one entry per token, for the K tokens in front of the user's words."""
    others: Mapping[str, NDArray[Any]]
    """Inputs that are neither pixels nor per token, such as grids and times."""
    pixels: Mapping[str, tuple[str, tuple[int, ...]]]
    """Dtypes, as torch names them, and shapes of the pixels and their masks."""

    def sample(self, clip: Clip) -> VideoSample:
        """Returns the clip without pixels: its frames are one 0 that is repeated, which takes no memory."""
        frames = torch.zeros((), dtype=torch.uint8).expand(self.shape)
        return VideoSample(clip.video_id, frames, clip.label, self.timing, clip, self.video, self)


@runtime_checkable
class KnowsVideos(Protocol):
    """An encoder that knows, in the main process, which videos need not be decoded."""

    @property
    def knows_videos(self) -> bool:
        """Whether the embeddings of any video may be known."""
        ...

    def find_known(self, video: str, prompt: Prompt, read: Callable[[], VideoSample]) -> KnownVideo | None:
        """Returns what a prompt needs of a video whose embeddings are known; None if the video has to be decoded.

        Args:
            video: ``VideoSample.identity`` of the video.
            prompt: The prompt that will be asked about it.
            read: Decodes the video, in case its embeddings are lost before they are used.
        """
        ...
