"""How many frames of a clip to look at, and how large, judged by the clips that were measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.sources.probing import ClipProbe

FRAMES_PER_SECOND = 2
"""Of the median clip; what video-language models are commonly shown"""
FEWEST_FRAMES = 8
MOST_FRAMES = 32
EMBEDDED_FRAMES = FrameOptions().num_frames
"""The most that the embedded base takes"""
MOST_PIXELS = 448 * 448
"""Of a frame; 256 visual tokens for two frames in Qwen2.5-VL"""


@dataclass(frozen=True)
class FrameSuggestion:
    """What ``data.yaml`` starts from."""

    num_frames: int
    max_pixels: int
    why_frames: str
    why_pixels: str


def suggest_frames(probes: Sequence[ClipProbe]) -> FrameSuggestion:
    """Two frames per second of the median clip, within limits; no more pixels than nine clips in ten have.

    Args:
        probes: at least one.
    """
    seconds = median(probe.seconds for probe in probes)
    wanted = min(max(2 * math.ceil(FRAMES_PER_SECOND * seconds / 2), FEWEST_FRAMES), MOST_FRAMES)
    num_frames = min(wanted, EMBEDDED_FRAMES)
    why_frames = (
        f"{FRAMES_PER_SECOND} per second of the median clip ({seconds:.1f} s), {FEWEST_FRAMES} to {MOST_FRAMES}"
    )
    if wanted > num_frames:
        why_frames += (
            f", would be {wanted}; the embedded base takes at most {EMBEDDED_FRAMES}, "
            f"with another --vlm add --data.init_args.frames.num_frames {wanted}"
        )
    sizes = [probe.height * probe.width for probe in probes]
    large = int(quantiles(sizes, n=10, method="inclusive")[-1]) if len(sizes) > 1 else sizes[0]
    largest = max(probes, key=lambda probe: probe.height * probe.width)
    typical = sorted(probes, key=lambda probe: probe.height * probe.width)[len(probes) // 2]
    if large >= MOST_PIXELS:
        why_pixels = f"448 x 448; larger frames shrink to it (the median clip is {typical.width} x {typical.height})"
        return FrameSuggestion(num_frames, MOST_PIXELS, why_frames, why_pixels)
    shrinks = f"; only larger ones shrink, up to {largest.width} x {largest.height}" if max(sizes) > large else ""
    why_pixels = f"nine clips in ten have no more (the median clip is {typical.width} x {typical.height}){shrinks}"
    return FrameSuggestion(num_frames, max(large, 1), why_frames, why_pixels)
