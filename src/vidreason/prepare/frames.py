"""Suggests number and size of frames per clip from the measured clips, within the limits of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from vidreason.config.vlm_shorthand import model_section
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.measuring import ClipProbe

FRAMES_PER_SECOND = 2
"""Sampling rate for the median clip, as common for video-language models."""
FEWEST_FRAMES = 8
MOST_FRAMES = 32
EMBEDDED_FRAMES = FrameOptions().num_frames
"""Maximum number of frames of the embedded base."""
MOST_PIXELS = 448 * 448
"""Pixels of a frame; 256 visual tokens for two frames in Qwen2.5-VL."""
FEWEST_PIXELS = 128 * 28 * 28
"""Pixels to which Qwen2.5-VL enlarges smaller frames."""
EMBEDDED_TOKENS = 6
"""Visual tokens of a frame in the embedded base."""
_EMBEDDED = "configs/scale/embedded.yaml"


@dataclass(frozen=True)
class FrameLimits:
    """Largest number and size of frames that a model takes of a clip."""

    frames: int
    pixels: int
    """Pixels of a frame."""
    embedded: bool
    """True if the model is the embedded base, whose limit of frames others do not share."""


def limits_of(vlm: str | None) -> FrameLimits:
    """Returns the limits of a model.

    Args:
        vlm: Section file, hub id or folder; None is the embedded base.

    Raises:
        ValueError: If the model or the file cannot be found.
    """
    if vlm is None:
        return FrameLimits(EMBEDDED_FRAMES, MOST_PIXELS, embedded=True)
    options = model_section(vlm).get("init_args") or {}
    embedded = options.get("scale") == _EMBEDDED
    return FrameLimits(
        frames=EMBEDDED_FRAMES if embedded else MOST_FRAMES,
        pixels=int(options.get("max_pixels") or MOST_PIXELS),
        embedded=embedded,
    )


@dataclass(frozen=True)
class FrameSuggestion:
    """The suggested frame options of ``data.yaml``, with reasons."""

    num_frames: int
    max_pixels: int
    why_frames: str
    why_pixels: str
    workers: int
    """Processes that decode and prepare clips; none for the embedded base, which needs little preparation."""


def suggest_frames(probes: Sequence[ClipProbe], limits: FrameLimits) -> FrameSuggestion:
    """Suggests two frames per second of the median clip, within limits, and the pixels of the 90th percentile.

    Args:
        probes: Measurements of at least one clip.
        limits: What the model takes.
    """
    # an even number, because Qwen2.5-VL merges two frames into one temporal patch
    seconds = median(probe.seconds for probe in probes)
    wanted = min(max(2 * math.ceil(FRAMES_PER_SECOND * seconds / 2), FEWEST_FRAMES), MOST_FRAMES)
    num_frames = min(wanted, limits.frames)
    why_frames = (
        f"{FRAMES_PER_SECOND} per second of the median clip ({seconds:.1f} s), {FEWEST_FRAMES} to {MOST_FRAMES}"
    )
    if wanted > num_frames:
        why_frames += (
            f", would be {wanted}; the embedded base takes at most {limits.frames}: for another model give --vlm MODEL"
        )
    sizes = [probe.height * probe.width for probe in probes]
    large = int(quantiles(sizes, n=10, method="inclusive")[-1]) if len(sizes) > 1 else sizes[0]  # 90 %
    largest = max(probes, key=lambda probe: probe.height * probe.width)
    typical = sorted(probes, key=lambda probe: probe.height * probe.width)[len(probes) // 2]
    workers = 0 if limits.embedded else 2
    if large >= limits.pixels:
        side = math.isqrt(limits.pixels)
        size = f"{side} x {side}" if side**2 == limits.pixels else "what the model's section allows"
        why_pixels = f"{size}; larger frames shrink to it (the median clip is {typical.width} x {typical.height})"
        return FrameSuggestion(num_frames, limits.pixels, why_frames, why_pixels, workers)
    shrinks = f"; only larger ones shrink, up to {largest.width} x {largest.height}" if max(sizes) > large else ""
    why_pixels = f"nine clips in ten have no more (the median clip is {typical.width} x {typical.height}){shrinks}"
    return FrameSuggestion(num_frames, max(large, 1), why_frames, why_pixels, workers)


def visual_tokens(frames: FrameSuggestion) -> dict[str, int]:
    """Returns about how many visual tokens a clip becomes in some models, before sides are rounded to whole tokens.

    The Qwen models merge two frames and squares of 28 or 32 pixels to a token.
    """
    pairs = math.ceil(frames.num_frames / 2)
    enlarged = max(frames.max_pixels, FEWEST_PIXELS)
    return {
        "the embedded base": EMBEDDED_TOKENS * frames.num_frames,
        "Qwen2.5-VL": pairs * round(enlarged / 28**2),
        "Qwen3-VL": pairs * round(frames.max_pixels / 32**2),
    }
