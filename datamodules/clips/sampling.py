"""Sampling of frames and of balanced training clips, as pure functions of indices.

The functions for frames return ascending positions in ``range(total)``. A clip with fewer frames than asked repeats
some of them instead of failing.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch

FrameChooser = Callable[[int, float], tuple[int, ...]]
"""Maps (frames in the file, frames per second) to the positions to take, as if frames were evenly spaced"""


def uniform_indices(total: int, n: int) -> tuple[int, ...]:
    """Returns the middle frame of each of ``n`` equal segments of the clip.

    Args:
        total: Frames in the clip.
        n: Frames to take.

    Returns:
        [n] ascending positions.

    Raises:
        ValueError: If either number is below one.

    Example:
        >>> uniform_indices(100, 4)
        (12, 37, 62, 87)
        >>> uniform_indices(2, 4)
        (0, 0, 1, 1)
    """
    _check(total, n)
    return tuple((2 * i + 1) * total // (2 * n) for i in range(n))


def segment_indices(total: int, n: int, generator: torch.Generator | None = None) -> tuple[int, ...]:
    """Returns one frame of each of ``n`` equal segments of the clip.

    Args:
        total: Frames in the clip.
        n: Segments, and frames to take.
        generator: Draws a random frame of each segment (training); None takes the middle one.

    Returns:
        [n] ascending positions.

    Raises:
        ValueError: If either number is below one.

    Example:
        >>> segment_indices(100, 4) == uniform_indices(100, 4)
        True
    """
    if generator is None:
        return uniform_indices(total, n)
    _check(total, n)
    draws = torch.rand(n, generator=generator, dtype=torch.float64).tolist()
    indices = []
    for i, draw in enumerate(draws):
        low, high = i * total // n, (i + 1) * total // n
        indices.append(low + int(draw * max(high - low, 1)))
    return tuple(indices)


def fps_indices(total: int, file_fps: float, fps: float, max_frames: int) -> tuple[int, ...]:
    """Returns frames at a fixed rate from the first one on, evenly thinned to at most ``max_frames``.

    Args:
        total: Frames in the clip.
        file_fps: Frames per second of the file.
        fps: Frames per second to take.
        max_frames: The most frames to take.

    Returns:
        Between 1 and ``max_frames`` ascending positions.

    Raises:
        ValueError: If a number is not positive.

    Example:
        >>> fps_indices(50, file_fps=25.0, fps=2.0, max_frames=8)
        (0, 12, 25, 37)
        >>> fps_indices(250, file_fps=25.0, fps=2.0, max_frames=4)
        (31, 93, 156, 218)
    """
    _check(total, max_frames)
    if not (file_fps > 0 and fps > 0):
        raise ValueError(f"frame rates must be positive, got {file_fps} for the file and {fps} for the sample")
    count = max(int(total / file_fps * fps + 1e-3), 1)
    if count > max_frames:
        return uniform_indices(total, max_frames)
    return tuple(min(int(i * file_fps / fps + 1e-3), total - 1) for i in range(count))


@dataclass(frozen=True)
class ShownFrames:
    """Frames shown at chosen moments of a clip, expressed as for a clip of constant frame rate."""

    frames: tuple[int, ...]
    """[T] positions in the file"""
    moments: tuple[int, ...]
    """[T] in units of 1 / fps from the first frame on"""
    total: int
    """length of the clip in those units"""
    fps: float


def choose_by_time(choose: FrameChooser, times: Sequence[float], header_fps: float) -> ShownFrames:
    """Chooses moments of a clip and returns the frames that are shown then.

    At a constant frame rate, moments are frame positions. Otherwise a moment is as long as the shortest frame.

    Args:
        choose: Which moments to take.
        times: When each frame of the file is shown, ascending, in seconds; any origin. Times that make no sense (not
            finite, not ascending) are passed over, and the frames taken for evenly spaced.
        header_fps: What the file says its rate is; believed within 1 %.

    Example:
        >>> choose_by_time(lambda total, fps: uniform_indices(total, 2), (9.0, 9.1, 9.2, 9.3, 9.4, 14.0), 1.0).frames
        (4, 4)
    """
    total = len(times)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    # a file that keeps no times answers with the smallest integers
    if not gaps or not min(gaps) > 0 or not math.isfinite(sum(gaps)) or abs(times[0]) > 1e9:
        moments = choose(total, header_fps)
        return ShownFrames(moments, moments, total, header_fps)
    mean = sum(gaps) / len(gaps)
    fps = header_fps if math.isclose(header_fps * mean, 1.0, rel_tol=0.01) else 1 / mean
    if all(abs(time - times[0] - place * mean) < mean / 4 for place, time in enumerate(times)):
        moments = choose(total, fps)
        return ShownFrames(moments, moments, total, fps)
    unit = max(min(gaps), mean / 100)
    total = round((times[-1] - times[0]) / unit) + 1
    moments = choose(total, 1 / unit)
    # containers round times to a clock of their own: a quarter late is in time
    frames = tuple(bisect_right(times, times[0] + (moment + 0.25) * unit) - 1 for moment in moments)
    return ShownFrames(frames, moments, total, 1 / unit)


def balanced_order(labels: Sequence[str | None], n: int, seed: int, epoch: int) -> list[int]:
    """Draws ``n`` clips so that all labels are equally frequent; an epoch continues where the last one ended.

    Args:
        labels: Of every clip.
        n: Clips to draw; the same in every epoch.
        seed: Of the order.
        epoch: Counted from 0.

    Returns:
        [n] positions in ``labels``; the clips of a label are gone through in an order drawn anew for each lap.

    Example:
        >>> labels = ["a", "a", "a", "b"]
        >>> [labels[i] for i in balanced_order(labels, 4, seed=0, epoch=0)].count("b")
        2
    """
    clips: dict[str, list[int]] = {}
    for position, label in enumerate(labels):
        clips.setdefault(label or "", []).append(position)
    names = sorted(clips)

    @cache
    def turn_order(turn: int) -> list[str]:
        return random.Random(f"{seed}/{turn}").sample(names, len(names))

    @cache
    def lap_order(name: str, lap: int) -> list[int]:
        return random.Random(f"{seed}/{name}/{lap}").sample(clips[name], len(clips[name]))

    turns = -(-n // len(names))
    drawn: list[int] = []
    for draw in range(n):
        turn, place = epoch * turns + draw // len(names), draw % len(names)
        name = turn_order(turn)[place]
        lap, index = divmod(turn, len(clips[name]))
        drawn.append(lap_order(name, lap)[index])
    return drawn


def _check(total: int, n: int) -> None:
    if total < 1 or n < 1:
        raise ValueError(f"cannot take {n} frames out of {total}")
