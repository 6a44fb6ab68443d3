"""Turns a folder or table of clips into the files that every command reads.

It opens every clip once, makes missing splits and writes manifest, task and data section into a new folder. The source
is never written to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vidreason.config.vlm_shorthand import model_section
from vidreason.datamodules.atomic_files import write_text
from vidreason.datamodules.sources.source import Source, SourceClip, SourceOptions, read_source
from vidreason.prepare import files, report
from vidreason.prepare.files import LeftOut, printable
from vidreason.signals import handle_signals

if TYPE_CHECKING:
    from vidreason.datamodules.clips.measuring import ClipProbe
    from vidreason.datamodules.sources.new_splits import Assignment


@dataclass(frozen=True)
class PrepareOptions:
    """The options of ``vidreason init``."""

    source: Path
    out: Path
    reading: SourceOptions
    """Names of columns, root folder and row filter of a source that is a table."""
    overwrite: bool
    """True replaces the files of an earlier call."""
    new_splits: bool
    """True makes all splits anew, ignoring those of the source."""
    seed: int
    """Seed of the splits that have to be made."""
    timeout_s: float
    """Seconds that reading one clip may take."""
    workers: int
    """Number of clips read at the same time."""
    vlm: str | None = None
    """Section file, hub id or folder of the model to suggest frames for; None is the embedded base."""


def write_task_folder(options: PrepareOptions) -> None:
    """Reads a source, probes its clips and writes the files.

    Raises:
        ValueError: If source or options have a mistake; the message names file, row or option and the remedy.
    """
    _check_folders(options.source, options.out, options.overwrite)
    if options.vlm is not None:
        model_section(options.vlm)  # raises before clips are read
    source = read_source(options.source, options.reading)
    labels = _class_names(source)

    # importing torch takes seconds, so the source and most mistakes in it are reported before
    print("\n".join(report.source_lines(source)), flush=True)
    _check_names(source, labels)
    probes, left_out = _probe(source, options.workers, options.timeout_s)
    _check_classes_readable(source, labels, probes, left_out)
    assignment = _assign(source, probes, options.seed, options.new_splits)
    _write(source, labels, probes, left_out, assignment, options)


def _check_folders(source: Path, out: Path, force: bool) -> None:
    """Checks that nothing is written into the source and that no file is overwritten without ``--force``."""
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"--out {out} lies in {source}, which stays as it is; give a folder outside of it")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    there = [name for name in files.FILES if (out / name).exists()]
    for name in there:
        if source.exists() and (out / name).samefile(source):
            raise ValueError(f"--out {out} would overwrite {source}; give another folder")
    if there and not force:
        raise ValueError(f"{out / there[0]} exists; give --force to overwrite it, or another --out")
    parent = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise ValueError(f"--out {out}: no permission to write into {parent}")


def _class_names(source: Source) -> tuple[str, ...]:
    labels = tuple(sorted({clip.label for clip in source.clips}))
    if len(labels) < 2:
        raise ValueError(f"{source.path}: one class only, {labels[0]!r}; deciding takes at least two")
    return labels


def _check_names(source: Source, labels: Sequence[str]) -> None:
    """Checks that the class names are valid in a task file."""
    from vidreason.datamodules.task import Task

    try:
        Task.from_labels("task", labels)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}; rename the class") from error


def _probe(source: Source, workers: int, timeout: float) -> tuple[dict[str, ClipProbe], list[LeftOut]]:
    """Opens every clip, with a progress bar.

    Returns:
        Measurements by video id, and the clips that cannot be used.
    """
    from tqdm import tqdm

    from vidreason.datamodules.sources.probing import Unreadable, probe_clips

    probes: dict[str, ClipProbe] = {}
    left_out: list[LeftOut] = []
    readable = [clip for clip in source.clips if _is_text(clip)]
    results = probe_clips([(clip.file, clip.stretch) for clip in readable], workers, timeout)
    bar = tqdm(results, total=len(readable), desc="reading clips", unit="clip", leave=False, disable=None)
    with handle_signals():  # Ctrl-C ends the reads, too
        for clip, result in zip(readable, bar, strict=True):
            if isinstance(result, Unreadable):
                left_out.append(LeftOut(clip.file, clip.name, clip.label, result.reason))
            else:
                probes[clip.name] = result
    for clip in source.clips:
        if not _is_text(clip):
            label, reason = printable(clip.label), "its name is not UTF-8; rename it"
            left_out.append(LeftOut(clip.file, printable(clip.name), label, reason))
    return probes, left_out


def _check_classes_readable(
    source: Source, labels: Sequence[str], probes: Mapping[str, ClipProbe], left_out: Sequence[LeftOut]
) -> None:
    for label in labels:
        clips = [clip for clip in source.clips if clip.label == label]
        if any(clip.name in probes for clip in clips):
            continue
        first = next(clip for clip in left_out if clip.label == printable(label))
        what = "folder" if source.path.is_dir() else "rows"
        raise ValueError(
            f"class {printable(label)!r}: none of its clips ({len(clips)}) can be read, {first.video_id}: "
            f"{first.reason}; repair them, or remove the class's {what}"
        )


def _assign(source: Source, probes: Mapping[str, ClipProbe], seed: int, anew: bool) -> Assignment:
    from vidreason.datamodules.sources.new_splits import assign_splits, group_by_content
    from vidreason.datamodules.types import Clip

    clips = [
        Clip(
            *(clip.file, clip.label, clip.name, "" if anew else clip.split, clip.group, clip.fields, clip.place),
            stretch=clip.stretch,
        )
        for clip in source.clips
        if clip.name in probes
    ]
    shas = [probes[clip.video_id].sha for clip in clips]
    parts = [sha if clip.stretch is None else f"{sha} {clip.stretch}" for clip, sha in zip(clips, shas, strict=True)]
    # the parts of a video belong together, unless the source has groups of its own
    together = [part if clip.group else sha for clip, sha, part in zip(clips, shas, parts, strict=True)]
    try:
        assignment = assign_splits(group_by_content(clips, together), together, seed)
    except ValueError as error:
        hint = "" if anew or not any(clip.split for clip in source.clips) else "; --new-splits makes all of them"
        raise ValueError(f"{source.path}: {error}{hint}") from error
    for line in report.copy_lines(clips, parts):
        print(line)
    return assignment


def _write(
    source: Source,
    labels: Sequence[str],
    probes: Mapping[str, ClipProbe],
    left_out: Sequence[LeftOut],
    assignment: Assignment,
    options: PrepareOptions,
) -> None:
    """Writes the files and prints a summary and the next commands."""
    from vidreason.prepare.frames import limits_of, suggest_frames

    out = options.out
    folder = out.resolve()
    frames = suggest_frames(list(probes.values()), limits_of(options.vlm))
    place = {clip.name: number for number, clip in enumerate(source.clips)}
    clips = sorted((c for found in assignment.splits.values() for c in found), key=lambda c: place[c.video_id])
    metadata = sorted({name for clip in clips for name in clip.fields})
    commands = files.next_commands(out, options.vlm)
    facts = "\n".join(
        [
            *report.probe_lines(list(probes.values()), left_out, frames),
            *report.split_lines(assignment, labels, options.seed),
            *report.frame_lines(frames),
        ]
    )
    print(facts)
    texts = {
        files.MANIFEST: files.manifest_text(clips, probes, folder),
        files.TASK: files.task_text(files.task_name(out), labels, source.question, metadata),
        files.DATA: files.data_text(folder, frames, tuple(assignment.splits)),
        files.README: files.readme_text(out, commands, facts),
    }
    if left_out:
        texts[files.UNREADABLE] = files.unreadable_text(left_out, folder)
    else:
        (folder / files.UNREADABLE).unlink(missing_ok=True)  # of an earlier call
    for name, text in texts.items():
        write_text(folder / name, text)
    print(f"written to {out}: {', '.join(name for name in files.FILES if name in texts)}")
    print(f"next: say in {out / files.TASK} what the classes mean (the lines marked EDIT), then")
    for command in commands:
        print(f"  {command}")


def _is_text(clip: SourceClip) -> bool:
    """Returns whether path, name and label can be encoded as UTF-8; Python allows file names that cannot."""
    try:
        f"{clip.file}{clip.name}{clip.label}".encode()
    except UnicodeEncodeError:
        return False
    return True
