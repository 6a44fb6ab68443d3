"""Black frames: what a blinded model is shown, and what stands for a training clip that cannot be read.

T frames of H x W pixels.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from vidreason.datamodules.clips.decoded import NOMINAL_FPS, fit_size
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.types import Clip, FrameTiming, VideoSample

_SIDE = 224
"""Pixels; no processor refuses frames of this size"""


def blackened(sample: VideoSample, like: VideoSample | None = None) -> VideoSample:
    """Returns the sample with every pixel black; its identity is that of any black video of this shape.

    Args:
        sample: Of a clip.
        like: Another sample whose shape and timing it takes.
    """
    like = like or sample
    shape = tuple(like.frames.shape)
    return replace(sample, frames=torch.zeros_like(like.frames), timing=like.timing, identity=f"blank {shape}")


def placeholder_video(clip: Clip, options: FrameOptions) -> VideoSample:
    """Returns a black video of as many frames as are asked for, for a clip that cannot be read."""
    height, width = fit_size(_SIDE, _SIDE, options.max_pixels)
    frames = torch.zeros(options.num_frames, 3, height, width, dtype=torch.uint8)
    timing = FrameTiming(NOMINAL_FPS, options.num_frames, tuple(range(options.num_frames)))
    return blackened(VideoSample(clip.video_id, frames, clip.label, timing, clip))
