"""Clips that are parts of longer videos: the columns ``start`` and ``end``, in seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vidreason.datamodules.clips.sampling import Stretch
from vidreason.datamodules.sources.rows import Row

if TYPE_CHECKING:  # imports torch
    from vidreason.datamodules.types import Clip

STRETCH_COLUMNS = ("start", "end")


def stretch_of(row: Row) -> Stretch | None:
    """Returns the part of the video that a row is about; None if it has neither start nor end.

    Raises:
        ValueError: If these are no seconds, or the part is empty; the message does not name the row.
    """
    texts = [row.get(column) for column in STRETCH_COLUMNS]
    if not any(texts):
        return None
    seconds = []
    for column, text, missing in zip(STRETCH_COLUMNS, texts, (0.0, math.inf), strict=True):
        try:
            seconds.append(float(text) if text else missing)
        except ValueError as error:
            raise ValueError(f"{column} {text!r}: is no number of seconds, such as 12.5") from error
    return Stretch(*seconds)


def name_of(path: str, stretch: Stretch | None) -> str:
    """Returns the id of a clip without one: its path, and the part of the video as in a media fragment URI.

    Example:
        >>> name_of("a.mp4", Stretch(10, 20.5))
        'a.mp4#t=10,20.5'
    """
    if stretch is None:
        return path
    end = "" if math.isinf(stretch.end) else f",{stretch.end:.10g}"
    return f"{path}#t={stretch.start:.10g}{end}"


def grouped_by_video(clips: Sequence[Clip], names: Sequence[str]) -> list[Clip]:
    """Returns the clips; those of a video of which some clip is a part are in a group, unless they have one.

    Args:
        clips: Clips, of which some may be parts of videos.
        names: [clips] name of each clip's video, which becomes the group.
    """
    parted = {clip.path for clip in clips if clip.stretch is not None}
    return [
        replace(clip, group=name) if clip.path in parted and not clip.group else clip
        for clip, name in zip(clips, names, strict=True)
    ]
