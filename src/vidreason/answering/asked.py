"""What a classifier is asked about: paths, listed clips, frames in memory; and which of them go through it together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vidreason.datamodules.inference_data import INFERENCE_SPLIT, ReadClip
from vidreason.datamodules.sources.listing import ListedClip
from vidreason.datamodules.types import Clip

Video = str | os.PathLike[str] | ListedClip | np.ndarray | Tensor


@dataclass(frozen=True)
class Asked:
    """A clip that a classifier is asked about."""

    name: str
    clip: Clip
    frames: tuple[Tensor, float] | None = None
    """Frames [T, 3, H, W] uint8 in memory and their rate; None for a file."""


def named(videos: Iterable[Video], fps: float | None) -> Iterator[Asked]:
    """Yields each video as a clip whose id is the path as it was given, or a number for frames in memory."""
    for number, video in enumerate(videos):
        if isinstance(video, ListedClip):
            fields, where = video.fields, video.where
            clip = Clip(video.path, None, video.name, INFERENCE_SPLIT, "", fields, where, video.stretch)
            yield Asked(video.name, clip)
        elif isinstance(video, str | os.PathLike):
            name = os.fspath(video)
            yield Asked(name, Clip(Path(name), None, name, INFERENCE_SPLIT))
        else:
            name = f"frames {number}"
            yield Asked(name, Clip(Path(name), None, name, INFERENCE_SPLIT), _frames(video, fps, name))


def rounds_of(batch: Sequence[ReadClip]) -> tuple[list[dict[str, ReadClip]], list[int]]:
    """Divides a batch so that clips with one id are one clip; nearly always it stays together.

    A file may be given twice; it is decided once. Another one may have the path that is the id of a clip of the run.

    Returns:
        The clips of each round by id, and [batch] the round of each clip.
    """
    rounds: list[dict[str, ReadClip]] = []
    round_of = []
    for read in batch:
        fits = (number for number, clips in enumerate(rounds) if _same(clips.get(read.clip.video_id), read))
        number = next(fits, len(rounds))
        if number == len(rounds):
            rounds.append({})
        rounds[number].setdefault(read.clip.video_id, read)
        round_of.append(number)
    return rounds, round_of


def _same(there: ReadClip | None, read: ReadClip) -> bool:
    if there is None or there.clip.path == read.clip.path:
        return True
    return bool(read.content) and there.content == read.content and there.clip.fields == read.clip.fields


def _frames(video: np.ndarray | Tensor, fps: float | None, name: str) -> tuple[Tensor, float]:
    """Returns frames [T, H, W, 3] uint8 as ([T, 3, H, W], frames per second)."""
    frames = torch.as_tensor(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8 or not len(frames):
        raise ValueError(f"{name}: frames must be [T, H, W, 3] uint8, got {list(frames.shape)} {frames.dtype}")
    if fps is None or not fps > 0:
        raise ValueError(f"{name}: give the frames per second of frames in memory: fps=25.0")
    return frames.permute(0, 3, 1, 2), float(fps)
