"""``vidreason data check``: decodes every clip of a manifest and reports on each, and on the set."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vidreason.datamodules.atomic_files import write_text
from vidreason.datamodules.clips.decoding import decode_clip_completely
from vidreason.datamodules.clips.measuring import ClipProbe, measure_clip
from vidreason.datamodules.clips.sampling import Stretch
from vidreason.datamodules.clips.time_limit import ReadTimeoutError, call_reader
from vidreason.datamodules.sources.probing import Unreadable, map_clips
from vidreason.datamodules.sources.source import SourceClip, SourceOptions, read_source
from vidreason.datamodules.types import Clip
from vidreason.prepare.files import printable
from vidreason.prepare.findings import Finding, find_all
from vidreason.signals import handle_signals

_MOST_LINES = 20


@dataclass(frozen=True)
class Listed:
    """One row of the manifest."""

    place: str
    """``row 12``, or the path within the folder."""
    path: str
    video_id: str
    label: str
    split: str
    group: str


@dataclass(frozen=True)
class Decoded:
    """Properties of a clip that was decoded; None where it was not."""

    reader: str | None = None
    reader_reason: str | None = None
    frames: int | None = None
    """Frames that can be decoded."""
    size: tuple[int, int] | None = None
    """Width and height in pixels, upright."""
    rotation: int | None = None
    """Degrees by which the file asks to turn its frames."""
    fps: float | None = None
    duration: float | None = None
    """Length in seconds."""


@dataclass(frozen=True)
class ClipReport:
    """The report of one row of the manifest."""

    listed: Listed
    status: str
    """``ok``, ``partial`` (some frames are lost) or ``reject``."""
    decoded: Decoded = Decoded()
    seconds: float = 0.0
    """Time that decoding took."""
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns all values in one level, as they are written as JSON."""
        own = {"seconds": self.seconds, "error": self.error}
        return {**asdict(self.listed), "status": self.status, **asdict(self.decoded), **own}


@dataclass(frozen=True)
class Measured:
    """A clip that was decoded, with what was found."""

    probe: ClipProbe
    rotation: int
    seconds: float
    remark: str | None = None


@dataclass(frozen=True)
class CheckReport:
    """The result of a check."""

    manifest: str
    clips: tuple[ClipReport, ...]
    findings: tuple[Finding, ...]

    @property
    def rejected(self) -> int:
        """Number of clips that cannot be read."""
        return sum(clip.status == "reject" for clip in self.clips)


def check_manifest(manifest: Path, options: SourceOptions, workers: int, timeout: float) -> CheckReport:
    """Decodes all clips that a manifest lists.

    Args:
        manifest: A table, chat records or a folder, as ``read_source`` reads them; labels may be missing.
        options: Names of columns, root folder and row filter.
        workers: Clips decoded at the same time.
        timeout: Seconds that reading a clip may take.

    Raises:
        ValueError: If the manifest itself cannot be read.
    """
    source = read_source(manifest, replace(options, as_listed=True))
    clips = [_clip(clip) for clip in source.clips]
    reports, probes = [], {}
    with handle_signals():  # Ctrl-C ends the reads, too
        for place, (listed, result) in enumerate(zip(source.clips, _measured(clips, workers, timeout), strict=True)):
            reports.append(_report(listed, result))
            if isinstance(result, Measured):
                probes[place] = result.probe
    return CheckReport(str(manifest), tuple(reports), tuple(find_all(clips, probes)))


def write_report(report: CheckReport, file: Path) -> None:
    """Writes a report as JSON."""
    counts = Counter(clip.status for clip in report.clips)
    content = {
        "manifest": printable(report.manifest),
        "counts": {status: counts[status] for status in ("ok", "partial", "reject")},
        "clips": [clip.as_dict() for clip in report.clips],
        "findings": [asdict(finding) for finding in report.findings],
    }
    write_text(file, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def report_lines(report: CheckReport) -> list[str]:
    """Returns the report as lines of text."""
    counts = Counter(clip.status for clip in report.clips)
    readers = Counter(clip.decoded.reader for clip in report.clips if clip.decoded.reader)
    by = ", ".join(f"{name} {n}" for name, n in readers.most_common()) or "none"
    lines = [
        f"{report.manifest}: {len(report.clips)} clips, {counts['ok']} ok, {counts['partial']} partial, "
        f"{counts['reject']} rejected; read by {by}"
    ]
    for status in ("reject", "partial"):
        told = [f"  {status}: {clip.listed.video_id}: {clip.error}" for clip in report.clips if clip.status == status]
        lines += _first(told)
    lines += _first([f"  {f.kind}: {f.message}{': ' if f.clips else ''}{_first_ids(f.clips)}" for f in report.findings])
    return [_plain(line) for line in lines]


def _measured(clips: Sequence[Clip], workers: int, timeout: float) -> Iterator[Measured | Unreadable]:
    listed = [(clip.path, clip.stretch) for clip in clips]
    results = map_clips(lambda path, stretch: measure_completely(path, stretch, timeout), listed, workers)
    yield from tqdm(results, total=len(clips), desc="decoding", unit="clip", leave=False, disable=None)


def measure_completely(path: Path, stretch: Stretch | None, timeout: float) -> Measured:
    """Measures a clip as training reads it, then decodes every frame of it; each within the time limit.

    Raises:
        DecodeError: If no frame can be read.
    """
    start = time.perf_counter()
    probe = call_reader(measure_clip, path, stretch, timeout=timeout)
    rotation, remark = 0, "some frames cannot be decoded" if probe.partial else None
    if stretch is None:
        try:
            contents = call_reader(decode_clip_completely, path, probe.reader, timeout=timeout)
        except ReadTimeoutError:
            contents, remark = None, f"not decoded completely within {timeout:g} seconds; the sampled frames are fine"
        if contents is not None:
            partial = contents.partial or probe.partial
            probe = replace(probe, frames=contents.frames, partial=partial)
            rotation, remark = contents.rotation, "some frames cannot be decoded" if partial else None
    return Measured(probe, rotation, time.perf_counter() - start, remark)


def _clip(listed: SourceClip) -> Clip:
    return Clip(
        *(listed.file, listed.label or None, listed.name, listed.split, listed.group, listed.fields, listed.place),
        stretch=listed.stretch,
    )


def _report(clip: SourceClip, result: Measured | Unreadable) -> ClipReport:
    texts = (clip.place, str(clip.file), clip.name, clip.label, clip.split, clip.group)
    listed = Listed(*map(printable, texts))
    if isinstance(result, Unreadable):
        return ClipReport(listed, "reject", error=printable(result.reason) if clip.name else "the row has no path")
    probe = result.probe
    decoded = Decoded(
        reader=probe.reader,
        reader_reason=probe.why,
        frames=probe.frames,
        size=(probe.width, probe.height),
        rotation=result.rotation,
        fps=round(probe.fps, 3),
        duration=round(probe.seconds, 3),
    )
    status = "partial" if probe.partial else "ok"
    return ClipReport(listed, status, decoded, round(result.seconds, 3), result.remark)


def _first(lines: Sequence[str]) -> list[str]:
    more = [f"  and {len(lines) - _MOST_LINES} more (--json lists all)"] if len(lines) > _MOST_LINES else []
    return [*lines[:_MOST_LINES], *more]


def _first_ids(ids: Sequence[str]) -> str:
    return ", ".join(ids[:4]) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")


def _plain(text: str) -> str:
    """Returns a line without control characters, which a file name may contain."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in printable(text))
