"""Black videos: for views that hide the video, and as placeholders for training clips that cannot be read."""

from __future__ import annotations

from dataclasses import replace

import torch

from vidreason.datamodules.clips.decoded import NOMINAL_FPS, fit_size
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.types import Clip, FrameTiming, VideoSample

_SIDE = 224
"""Height and width in pixels; every processor accepts this size"""


def blackened(sample: VideoSample, like: VideoSample | None = None) -> VideoSample:
    """Returns the sample with every pixel black; all black videos of one shape have the same identity.

    Args:
        sample: The sample of a clip.
        like: Another sample, whose shape and timing are used; None uses those of ``sample``.
    """
    like = like or sample
    shape = tuple(like.frames.shape)
    return replace(sample, frames=torch.zeros_like(like.frames), timing=like.timing, identity=f"blank {shape}")


def placeholder_video(clip: Clip, options: FrameOptions) -> VideoSample:
    """Returns a black video with the number of frames that the options ask for."""
    height, width = fit_size(_SIDE, _SIDE, options.max_pixels)
    frames = torch.zeros(options.num_frames, 3, height, width, dtype=torch.uint8)
    timing = FrameTiming(NOMINAL_FPS, options.num_frames, tuple(range(options.num_frames)))
    return blackened(VideoSample(clip.video_id, frames, clip.label, timing, clip))
