"""Sampling of frames and of balanced training clips, as pure functions of indices; they do not need torch.

The functions for frames return ascending positions in ``range(total)``. If a clip has too few frames, some of them are
repeated.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

FrameChooser = Callable[[int, float], tuple[int, ...]]
"""Maps (frames in the file, frames per second) to the positions to take, as if frames were evenly spaced."""


@dataclass(frozen=True)
class Stretch:
    """A part of a video, in seconds from its first frame on.

    Args:
        start: Time of the first frame.
        end: Time behind the last frame; infinity is the end of the file.

    Raises:
        ValueError: If the part is empty or begins before the file does.
    """

    start: float = 0.0
    end: float = math.inf

    def __post_init__(self) -> None:
        if not (0 <= self.start < self.end and math.isfinite(self.start)):
            raise ValueError(f"start and end are seconds with 0 <= start < end, got {self.start:g} and {self.end:g}")


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


def segment_indices(total: int, n: int, draws: Sequence[float] | None = None) -> tuple[int, ...]:
    """Returns one frame of each of ``n`` equal segments of the clip.

    Args:
        total: Frames in the clip.
        n: Segments, and frames to take.
        draws: [n] random numbers in [0, 1), the place of the frame within each segment (training); None takes the
            middle one.

    Returns:
        [n] ascending positions.

    Raises:
        ValueError: If either number is below one.

    Example:
        >>> segment_indices(100, 4) == uniform_indices(100, 4)
        True
    """
    if draws is None:
        return uniform_indices(total, n)
    _check(total, n)
    indices = []
    for i, draw in zip(range(n), draws, strict=True):
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
    count = max(int(total / file_fps * fps + 1e-3), 1)  # 1e-3 against rounding down of exact multiples
    if count > max_frames:
        return uniform_indices(total, max_frames)
    return tuple(min(int(i * file_fps / fps + 1e-3), total - 1) for i in range(count))


@dataclass(frozen=True)
class ShownFrames:
    """Frames shown at chosen moments of a clip, expressed as for a clip of constant frame rate."""

    frames: tuple[int, ...]
    """[T] positions in the file."""
    moments: tuple[int, ...]
    """[T] times from the first frame on, in units of 1 / fps."""
    total: int
    """Length of the clip in those units."""
    fps: float


def choose_by_time(choose: FrameChooser, times: Sequence[float], header_fps: float) -> ShownFrames:
    """Chooses moments of a clip and returns the frames that are shown then.

    At a constant frame rate, moments are frame positions. Otherwise a moment is as long as the shortest frame.

    Args:
        choose: Chooses the moments.
        times: Time of each frame of the file in seconds, ascending, with any origin. If times are invalid (not finite
            or not ascending), frames are assumed to be evenly spaced.
        header_fps: Frame rate in the file's header, which is used if it is within 1 % of that of the times.

    Example:
        >>> choose_by_time(lambda total, fps: uniform_indices(total, 2), (9.0, 9.1, 9.2, 9.3, 9.4, 14.0), 1.0).frames
        (4, 4)
    """
    total = len(times)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    # decord returns the smallest integers for a file without times
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
    # containers round times to their own clock, so that a frame may start a quarter of a unit late
    frames = tuple(bisect_right(times, times[0] + (moment + 0.25) * unit) - 1 for moment in moments)
    return ShownFrames(frames, moments, total, 1 / unit)


def balanced_order(labels: Sequence[str | None], n: int, seed: int, epoch: int) -> list[int]:
    """Draws ``n`` clips so that all labels are equally frequent; an epoch continues where the last one ended.

    Args:
        labels: Label of every clip.
        n: Number of clips to draw; the same in every epoch.
        seed: Seed of the order.
        epoch: Epoch, counted from 0.

    Returns:
        [n] positions in ``labels``; each pass over the clips of a label has a new random order.

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
