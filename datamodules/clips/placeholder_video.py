"""Videos that hide something: black ones, also as placeholders of clips that cannot be read, and shuffled ones."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from vidreason.datamodules.clips.decoded import NOMINAL_FPS, fit_size
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.types import Clip, FrameTiming, VideoSample

_SIDE = 224
"""Height and width in pixels; every processor accepts this size."""


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


def shuffled(frames: Tensor, video_id: str) -> Tensor:
    """Returns the frames [T, 3, H, W] of a clip in a random order that depends on its id alone."""
    seed = int.from_bytes(hashlib.blake2b(video_id.encode(), digest_size=7).digest(), "big")
    return frames[torch.randperm(len(frames), generator=torch.Generator().manual_seed(seed))]
