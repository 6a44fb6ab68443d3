"""Videos whose embeddings are known, so that they need not be decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch

from vidreason.datamodules.types import Clip, KnownVideo, Prompt, VideoSample


@runtime_checkable
class KnowsVideos(Protocol):
    """An encoder that knows, in the main process, which videos need not be decoded."""

    @property
    def knows_videos(self) -> bool:
        """Returns False if no video is known, so that ``find_known`` need not be asked for each clip."""
        ...

    def find_known(self, video: str, prompt: Prompt, read: Callable[[], VideoSample]) -> KnownVideo | None:
        """Returns what a prompt needs of a video whose embeddings are known; None if the video has to be decoded.

        Args:
            video: ``VideoSample.identity`` of the video.
            prompt: The prompt that will be asked about it.
            read: Decodes the video, in case its embeddings are lost before they are used.
        """
        ...


def not_decoded(clip: Clip, known: KnownVideo) -> VideoSample:
    """Returns a clip without pixels: its frames are one 0 that is repeated, which takes no memory."""
    frames = torch.zeros((), dtype=torch.uint8).expand(known.shape)
    return VideoSample(clip.video_id, frames, clip.label, known.timing, clip, known.video, known)
