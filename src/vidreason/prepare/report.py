"""The lines that ``vidreason init`` prints about clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from vidreason.datamodules.sources.source import Source
from vidreason.pipelines.table import render_table
from vidreason.prepare.files import UNREADABLE, LeftOut, printable

if TYPE_CHECKING:  # these modules import torch
    from vidreason.datamodules.clips.measuring import ClipProbe
    from vidreason.datamodules.sources.new_splits import Assignment
    from vidreason.datamodules.types import Clip
    from vidreason.prepare.frames import FrameSuggestion

FEW_CLIPS = 10
"""Classes with fewer clips are listed, because their accuracy would be mostly chance."""
_MOST_LINES = 10
_MOST_CLASSES = 60


def source_lines(source: Source) -> list[str]:
    """Returns lines on what was found before any clip is opened."""
    labels = {clip.label for clip in source.clips}
    head = f"{source.path}: {source.kind}, {_count(len(source.clips), 'clip')}, {_count(len(labels), 'class', 'es')}"
    lines = [head, *(f"  {note}" for note in source.notes)]
    if all(label.replace(".", "", 1).lstrip("-").isdecimal() for label in labels):
        lines.append("  the labels are numbers: a model reads class names, words would tell it more")
    return [printable(line) for line in lines]


def probe_lines(probes: Sequence[ClipProbe], left_out: Sequence[LeftOut], frames: FrameSuggestion) -> list[str]:
    """Returns lines on the number and properties of readable clips, then on unreadable ones with the reasons."""
    lines = [
        f"{len(probes)} of {len(probes) + len(left_out)} clips can be read: "
        f"{_range([probe.seconds for probe in probes], 1)} s, {_range([probe.fps for probe in probes], 0)} frames per "
        f"second, {_sizes(probes)}"
    ]
    short = [probe.frames for probe in probes if probe.frames < frames.num_frames]
    if short:
        lines.append(
            f"  {_count(len(short), 'clip')} shorter than the {frames.num_frames} frames asked for (the shortest has "
            f"{min(short)}): frames are repeated"
        )
    if partial := sum(probe.partial for probe in probes):
        lines.append(f"  {_count(partial, 'clip')} damaged: what can be read of them is used")
    if left_out:
        lines.append(f"unreadable, left out and listed in {UNREADABLE}: {len(left_out)}")
        lines += [f"  {clip.video_id}: {clip.reason}" for clip in left_out[:_MOST_LINES]]
        if len(left_out) > _MOST_LINES:
            lines.append(f"  and {len(left_out) - _MOST_LINES} more")
    return [printable(line) for line in lines]


def copy_lines(clips: Sequence[Clip], shas: Sequence[str]) -> list[str]:
    """Returns lines on files with the same content, and on those among them with different labels."""
    same: dict[str, list[Clip]] = {}
    for clip, sha in zip(clips, shas, strict=True):
        same.setdefault(sha, []).append(clip)
    copies = [found for found in same.values() if len(found) > 1]
    if not copies:
        return []
    names = " = ".join(clip.video_id for clip in copies[0][:4])
    lines = [f"copies of the same clip, kept in one group and split: {len(copies)} (such as {names})"]
    for found in copies[:_MOST_LINES]:
        if len({clip.label for clip in found}) > 1:
            told = ", ".join(f"{clip.video_id} ({clip.label})" for clip in found[:4])
            lines.append(f"  different labels for the same clip, correct or remove one: {told}")
    return lines


def split_lines(assignment: Assignment, labels: Sequence[str], seed: int) -> list[str]:
    """Returns a table of clips per class and split, then lines on the classes with too few clips."""
    counts = {split: Counter(clip.label for clip in clips) for split, clips in assignment.splits.items()}
    rows = [[label, *(str(n[label]) for n in counts.values()), _total(counts, label)] for label in labels]
    if len(rows) > _MOST_CLASSES:
        more = len(rows) - _MOST_CLASSES
        rows = [*rows[:_MOST_CLASSES], [f"and {more} more", *([""] * (len(counts) + 1))]]
    sums = [str(sum(n.values())) for n in counts.values()]
    rows.append(["all", *sums, str(sum(map(int, sums)))])
    made = f"made by seed {seed}: {', '.join(assignment.made)}; " if assignment.made else ""
    lines = [f"clips per class and split ({made}no group lies in two):", render_table(["class", *counts, "all"], rows)]
    absent = [name for name in ("val", "cal", "test") if not any(split.startswith(name) for split in counts)]
    if absent:
        lines.append(
            f"too few groups to make {' and '.join(absent)}: bring more clips, or stages that need it will stop"
        )
    few = []
    for label in labels:
        gaps = [split for split in ("train", "val", "cal", "test") if split in counts and not counts[split][label]]
        n = sum(found[label] for found in counts.values())
        if gaps or n < FEW_CLIPS:
            few.append(f"  {label}: {_count(n, 'clip')}" + (f", none in {', '.join(gaps)}" if gaps else ""))
    if few:
        lines.append(f"classes with too few clips (fewer than {FEW_CLIPS}, or none in a split):")
        lines += few[:_MOST_LINES] + ([f"  and {len(few) - _MOST_LINES} more"] if len(few) > _MOST_LINES else [])
    return lines


def frame_lines(frames: FrameSuggestion) -> list[str]:
    """Returns lines on the suggested frame count and pixel budget, with reasons and the visual tokens of a clip."""
    from vidreason.prepare.frames import visual_tokens

    tokens = ", ".join(f"{count} in {model}" for model, count in visual_tokens(frames).items())
    return [
        f"frames per clip: {frames.num_frames} ({frames.why_frames})",
        f"pixels per frame: {frames.max_pixels} ({frames.why_pixels})",
        f"visual tokens per clip: about {tokens}; a stage logs those of its own model",
    ]


def _total(counts: Mapping[str, Counter[str | None]], label: str) -> str:
    return str(sum(n[label] for n in counts.values()))


def _sizes(probes: Sequence[ClipProbe]) -> str:
    sizes = Counter((probe.width, probe.height) for probe in probes)
    (width, height), n = sizes.most_common(1)[0]
    return f"{width} x {height}" + (f" ({n} of them; {len(sizes)} sizes)" if len(sizes) > 1 else "")


def _range(values: Sequence[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high} (median {median(values):.{digits}f})"


def _count(n: int, what: str, plural: str = "s") -> str:
    return f"{n} {what}{'' if n == 1 else plural}"
