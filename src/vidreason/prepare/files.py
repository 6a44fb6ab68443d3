"""The contents of the files that ``vidreason init`` writes."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vidreason.datamodules.sources.stretches import STRETCH_COLUMNS
from vidreason.datamodules.split_names import STANDARD_SPLITS
from vidreason.run_folder import TASK_FILE, UNREADABLE_FILE

if TYPE_CHECKING:  # these modules import torch
    from vidreason.datamodules.clips.measuring import ClipProbe
    from vidreason.datamodules.clips.sampling import Stretch
    from vidreason.datamodules.types import Clip
    from vidreason.prepare.frames import FrameSuggestion

MANIFEST, UNREADABLE, TASK, DATA, README = FILES = (
    "manifest.csv",
    UNREADABLE_FILE,
    TASK_FILE,
    "data.yaml",
    "README.txt",
)
_OWN_COLUMNS = ("path", "label", "split", "group", "video_id")
_MEASURED = (
    *("clip_seconds", "clip_fps", "clip_frames", "clip_width", "clip_height", "clip_sha256"),
    *("clip_reader", "clip_reader_reason"),
)
_DEFAULT_QUESTION = "What happens in the video?"


@dataclass(frozen=True)
class LeftOut:
    """A clip that cannot be used, with the reason."""

    file: Path
    video_id: str
    label: str
    reason: str


def manifest_text(clips: Sequence[Clip], probes: Mapping[str, ClipProbe], folder: Path) -> str:
    """Returns ``manifest.csv``: readable clips with split, group and measurements, then other columns of the source.

    Args:
        clips: Clips with their splits and groups.
        probes: Measurements by video id.
        folder: Folder of the file; paths are relative to it.
    """
    parts = STRETCH_COLUMNS if any(clip.stretch is not None for clip in clips) else ()
    taken = (*_OWN_COLUMNS, *parts, *_MEASURED)
    names = {name: _free(name, taken) for clip in clips for name in clip.fields if name not in _MEASURED}
    rows = []
    for clip in clips:
        probe = probes[clip.video_id]
        measured = (
            *(f"{probe.seconds:.3f}", f"{probe.fps:.3f}", probe.frames, probe.width, probe.height, probe.sha),
            *(probe.reader, probe.why),
        )
        own = (relative_path(clip.path, folder), clip.label, clip.split, clip.group, clip.video_id)
        rows.append(
            (
                *own,
                *(_seconds(clip.stretch, part) for part in parts),
                *measured,
                *(clip.fields.get(name, "") for name in names),
            )
        )
    return _csv((*taken, *names.values()), rows)


def _seconds(stretch: Stretch | None, part: str) -> str:
    value = math.inf if stretch is None else getattr(stretch, part)
    return f"{value:.10g}" if math.isfinite(value) else ""


def unreadable_text(clips: Sequence[LeftOut], folder: Path) -> str:
    """Returns ``unreadable.csv``: the clips that were left out, with the reason."""
    rows = [(printable(relative_path(clip.file, folder)), clip.label, clip.video_id, clip.reason) for clip in clips]
    return _csv(("path", "label", "video_id", "reason"), rows)


def task_text(name: str, labels: Sequence[str], question: str, metadata: Sequence[str]) -> str:
    """Returns a task file that works unchanged, with the lines to edit marked."""
    lines = [
        "# What is asked of every clip, in all stages. It works as it is, and better once the lines marked EDIT are",
        "# yours: definitions are shown to the model, so that it need not guess what a class name means.",
        f"name: {_quoted(name)}",
        f"question: {_quoted(question or _DEFAULT_QUESTION)} # EDIT: what you want to know, in one sentence",
        "classes:",
    ]
    for label in labels:
        lines += [
            f"  - name: {_quoted(label)}",
            '    definition: "" # EDIT: what is seen in a clip of this class, in one sentence',
        ]
    lines += ["ordinal: false # true: the order of the classes is a scale"]
    known = f" Here: {', '.join(metadata)}" if metadata else ""
    lines += [f"metadata_fields: [] # columns of manifest.csv that the model may read; they can leak the label.{known}"]
    return "\n".join(lines) + "\n"


def data_text(folder: Path, frames: FrameSuggestion, splits: Sequence[str]) -> str:
    """Returns ``data.yaml``, the data section of every command."""
    further = [name for name in splits if name not in STANDARD_SPLITS and not name.startswith("test")]
    tests = [name for name in splits if name.startswith("test")] + further
    lines = [
        "# The clips, as every command reads them: --data FILE. The two paths are absolute, so that it can be called",
        "# from any folder; change them after moving this one.",
        "class_path: vidreason.datamodules.manifest.ManifestDataModule",
        "init_args:",
        f"  manifest: {_path(folder / MANIFEST)}",
        f"  task: {_path(folder / TASK)}",
        "  frames:",
        f"    num_frames: {frames.num_frames} # {frames.why_frames}",
        f"    max_pixels: {frames.max_pixels} # {frames.why_pixels}",
        f"  num_workers: {frames.workers} # processes that decode and prepare clips",
    ]
    if further:
        lines.append(f"  test_splits: [{', '.join(map(_quoted, tests))}]")
    return "\n".join(lines) + "\n"


def readme_text(out: Path, commands: Sequence[str], facts: str) -> str:
    """Returns ``README.txt``: the files of the folder and the commands to run next."""
    return "\n".join(
        [
            facts,
            "",
            f"{TASK:15} what is asked, and the classes: fill in the lines marked EDIT first",
            f"{DATA:15} which clips, how many frames of each, how large",
            f"{MANIFEST:15} every readable clip with its label, split and group",
            f"{UNREADABLE:15} clips that were left out and why (only where there are any)",
            "",
            f"Run these where you ran `vidreason init` (paths such as {out} are relative to it):",
            "",
            *(f"    {command}" for command in commands),
            "",
        ]
    )


def next_commands(out: Path, vlm: str | None = None) -> list[str]:
    """Returns the commands to run next, ready to copy.

    Args:
        out: The folder of the files.
        vlm: The model, as ``--vlm`` names it; None is the embedded base.
    """
    run_dir = Path("runs") / (_slug(out.resolve().name))
    config = "configs/pipelines/deepintuit.yaml"
    model, where = [] if vlm is None else ["--vlm", vlm], ["--run_dir", f"{run_dir}"]
    return [
        shlex.join(["vidreason", "pipeline", "--config", config, "--data", f"{out / DATA}", *model, *where]),
        shlex.join(["vidreason", "classify", "new_clip.mp4", "--run", f"{run_dir}"]),
    ]


def task_name(out: Path) -> str:
    """Returns a name for the task, made of the name of its folder."""
    return _slug(out.resolve().name)


def relative_path(file: Path, folder: Path) -> str:
    """Returns the path relative to a folder; the absolute path on another drive (Windows)."""
    try:
        return Path(os.path.relpath(file, folder)).as_posix()
    except ValueError:
        return file.as_posix()


def printable(text: str) -> str:
    """Returns text that can be encoded as UTF-8: other bytes of a file name are written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _slug(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_").lower() or "my_task"


def _free(name: str, taken: Sequence[str]) -> str:
    """Returns a column name that is not taken: a column of the source may have the name of one of ours."""
    return f"{name}_original" if name in taken else name


def _quoted(text: str) -> str:
    """Returns a text as a quoted YAML string, also for ``no``, ``1``, colons and quotes; JSON is a subset of YAML."""
    return json.dumps(text, ensure_ascii=False)


def _path(path: Path) -> str:
    """Returns a path for a config file, with ``${`` escaped, which would begin an OmegaConf variable."""
    return _quoted(str(path)).replace("${", "\\\\${")  # YAML reads \\ as \, which escapes ${ for OmegaConf


def _csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
