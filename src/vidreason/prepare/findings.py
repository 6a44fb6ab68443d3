"""Finds faults of a set of clips as a whole: balance, overlap of splits, copies, telling metadata, dull clips."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vidreason.datamodules.clips.measuring import ClipProbe
from vidreason.datamodules.leaks import ABOVE_MAJORITY, value_accuracy
from vidreason.datamodules.types import Clip

MOST_UNBALANCED = 10.0
"""A class is reported that has this many times fewer clips of a split than the most frequent one."""
NEAR_DUPLICATE = (0.8, 0.6)
"""Two clips are near-duplicates if their hashes share these parts of the bits that either has, in space and in time."""
_FEWEST_BITS = 40  # in either half; with fewer, the hash of a clip says too little
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Finding:
    """A fault of the set of clips."""

    kind: str
    """balance, group_overlap, content_overlap, near_duplicate, metadata, black, constant or stretch."""
    message: str
    clips: tuple[str, ...] = ()
    """Ids of the clips that have the fault."""


def find_all(clips: Sequence[Clip], probes: Mapping[int, ClipProbe]) -> list[Finding]:
    """Returns everything that is wrong with a set of clips.

    Args:
        clips: All listed clips, readable or not.
        probes: Measurements of the readable ones, by their position in ``clips``.
    """
    return [
        *_balance(clips),
        *_group_overlap(clips),
        *_content_overlap(clips, probes),
        *_near_duplicates(clips, probes),
        *_telling_metadata(clips, probes),
        *_dull(clips, probes),
        *_long_stretches(clips, probes),
    ]


def _balance(clips: Sequence[Clip]) -> list[Finding]:
    labels = sorted({clip.label for clip in clips if clip.label})
    found = []
    for split in sorted({clip.split for clip in clips}):
        counts = Counter(clip.label for clip in clips if clip.split == split and clip.label)
        if not counts:
            continue
        most, largest = counts.most_common(1)[0]
        where = f" of split {split}" if split else ""
        absent = [label for label in labels if not counts[label]]
        rare = [label for label in labels if 0 < counts[label] * MOST_UNBALANCED <= largest]
        if absent:
            found.append(Finding("balance", f"no clip{where} has the class {_some(absent)}"))
        if rare:
            told = _some([f"{label} ({counts[label]})" for label in rare])
            found.append(Finding("balance", f"classes{where} are unbalanced: {most} has {largest} clips, {told}"))
    return found


def _group_overlap(clips: Sequence[Clip]) -> list[Finding]:
    groups: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        if clip.group:
            groups[clip.group].append(clip)
    return [
        Finding("group_overlap", f"group {name!r} is in the splits {_splits(members)}", _ids(members))
        for name, members in groups.items()
        if len({clip.split for clip in members}) > 1
    ]


def _content_overlap(clips: Sequence[Clip], probes: Mapping[int, ClipProbe]) -> list[Finding]:
    same: dict[str, list[Clip]] = defaultdict(list)
    for place, probe in probes.items():
        same[probe.sha].append(clips[place])
    found = []
    for members in same.values():
        pairs = [(a, b) for i, a in enumerate(members) for b in members[:i] if _overlap(a, b)]
        split = [pair for pair in pairs if pair[0].split != pair[1].split]
        labels = [pair for pair in pairs if pair[0].label != pair[1].label]
        if split:
            torn = _once_each(split)
            found.append(Finding("content_overlap", f"the same content is in {_splits(torn)}", _ids(torn)))
        if labels:
            torn = _once_each(labels)
            names = _some(sorted({str(clip.label) for clip in torn}))
            found.append(Finding("content_overlap", f"the same content has the labels {names}", _ids(torn)))
    return found


def _near_duplicates(clips: Sequence[Clip], probes: Mapping[int, ClipProbe]) -> list[Finding]:
    """Returns pairs of clips of two splits that look alike but differ in content."""
    if len({clip.split for clip in clips}) < 2:
        return []
    places = [place for place, probe in probes.items() if probe.looks and not probe.dull]
    if not places:
        return []
    bits = np.stack([np.unpackbits(np.frombuffer(probes[place].looks, np.uint8)) for place in places])
    halves = np.split(bits, 2, axis=1)
    found = []
    for first in range(0, len(places), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        alike = [_alike(half, rows, share) for half, share in zip(halves, NEAR_DUPLICATE, strict=True)]
        for row, column in np.argwhere(alike[0] & alike[1]):
            one, other = places[first + row], places[column]
            across = column < first + row and clips[one].split != clips[other].split
            if across and probes[one].sha != probes[other].sha:
                pair = (clips[other], clips[one])
                found.append(Finding("near_duplicate", f"look alike, in {_splits(pair)}", _ids(pair)))
    return found


def _alike(bits: NDArray[np.uint8], rows: slice, share: float) -> NDArray[np.bool_]:
    """Returns [rows, clips]: whether clips share enough of the bits that either has (Jaccard index)."""
    counts = bits.sum(axis=1, dtype=np.int64)
    shared = bits[rows].astype(np.float32) @ bits.T.astype(np.float32)
    either = counts[rows, None] + counts[None, :] - shared
    enough = np.minimum(counts[rows, None], counts[None, :]) >= _FEWEST_BITS
    alike: NDArray[np.bool_] = enough & (shared >= share * either)
    return alike


def _telling_metadata(clips: Sequence[Clip], probes: Mapping[int, ClipProbe]) -> list[Finding]:
    """Returns the columns, and measurements of the files, from which held-out labels can be told."""
    measured = [
        Clip(
            *(clip.path, clip.label, clip.video_id, clip.split, clip.group),
            {**clip.fields, **_measurements(probes.get(place))},
        )
        for place, clip in enumerate(clips)
        if clip.label
    ]
    if not measured:
        return []
    majority = Counter(clip.label for clip in measured).most_common(1)[0][1] / len(measured)
    found = []
    for name in sorted({name for clip in measured for name in clip.fields}):
        told = value_accuracy(measured, name)
        if told is not None and told >= majority + ABOVE_MAJORITY:
            found.append(
                Finding(
                    "metadata",
                    f"{name!r} alone tells the label of {100 * told:.0f} % of the clips, each held out in turn (the "
                    f"most frequent label: {100 * majority:.0f} %)",
                )
            )
    return found


def _measurements(probe: ClipProbe | None) -> dict[str, str]:
    if probe is None:
        return {}
    return {
        "size of the frames": f"{probe.width}x{probe.height}",
        "frame rate": f"{probe.fps:.2f}",
        "number of frames": str(probe.frames),
    }


def _dull(clips: Sequence[Clip], probes: Mapping[int, ClipProbe]) -> list[Finding]:
    what = {"black": "black from start to end", "constant": "nothing moves from start to end"}
    return [
        Finding(probe.dull, what[probe.dull], (clips[place].video_id,)) for place, probe in probes.items() if probe.dull
    ]


def _long_stretches(clips: Sequence[Clip], probes: Mapping[int, ClipProbe]) -> list[Finding]:
    found = []
    for place, probe in probes.items():
        stretch = clips[place].stretch
        if stretch is None or not np.isfinite(stretch.end):
            continue
        wanted = stretch.end - stretch.start
        if probe.seconds < wanted - max(0.5, 2 / probe.fps):
            message = f"the video ends {wanted - probe.seconds:.1f} s before the stretch does"
            found.append(Finding("stretch", message, (clips[place].video_id,)))
    return found


def _once_each(pairs: Sequence[tuple[Clip, Clip]]) -> list[Clip]:
    """Returns the clips of pairs (later, earlier) in the order of the list, each once."""
    return list({id(clip): clip for later, earlier in pairs for clip in (earlier, later)}.values())


def _overlap(one: Clip, other: Clip) -> bool:
    """Returns whether two clips of the same video share a part of it."""
    if one.stretch is None or other.stretch is None:
        return True
    return one.stretch.start < other.stretch.end and other.stretch.start < one.stretch.end


def _splits(clips: Sequence[Clip]) -> str:
    return " and ".join(sorted({clip.split or "(no split)" for clip in clips}))


def _ids(clips: Sequence[Clip]) -> tuple[str, ...]:
    return tuple(clip.video_id for clip in clips)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
