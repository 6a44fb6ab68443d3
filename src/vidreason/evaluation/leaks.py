"""Refuses evaluations on clips that a run, or a run that its weights come from, has used before."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError

from vidreason.config.built_stage import build_stage
from vidreason.config.finished_stage import find_stage
from vidreason.config.quiet import quietly
from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.file_hash import content_sha
from vidreason.datamodules.splits import first_five
from vidreason.datamodules.types import Clip
from vidreason.run_folder import CONFIG_FILE, SPLITS_FILE, RunState

USED_SPLITS = ("train", "val", "cal")
"""Splits that weights, checkpoints, temperatures and thresholds come from; no option names another one."""
_TAKEN = ("adapter_path", "calibrator_path", "traces_file", "fold_traces")
"""Settings of a stage that name what others wrote."""
_NOT_TRAINED_ON = ("test_splits", "predict_splits", "eval_batch_size", "num_workers")
"""Settings of data in which stages may differ that train on the same clips."""


def check_unseen(run: Path, data: VideoDataModule, splits: Sequence[str]) -> None:
    """Checks that no clip to evaluate was used to train, to choose a checkpoint or to fit a temperature or threshold.

    The clips of every stage of the run count, and those of the stages elsewhere that its weights and traces come from.

    Args:
        run: The run folder.
        data: The run's data module, set up.
        splits: The splits to evaluate.

    Raises:
        ValueError: If a split is none of test, or one of its clips was in train, val or cal of a stage, by its name in
            the stage's ``splits.csv`` or by its content.
    """
    for split in splits:
        if split in USED_SPLITS:
            raise ValueError(f"--splits {split}: the run has trained, chosen or calibrated on these clips")
        if not data.clips(split):
            raise ValueError(f"--splits {split}: has no clips; test splits are {', '.join(data.test_split_names)}")
    tested = [clip for split in splits for clip in data.clips(split)]
    _refuse(data, tested, "the run")
    stages = _stages(run)
    tested_stage = (stages[-1] if stages else find_stage(run).folder).resolve()
    lineage = _lineage([tested_stage, *stages])
    own = _described(lineage[tested_stage])
    known = [own]
    for folder, config in lineage.items():
        described = _described(config)
        if described == own:
            _check_recorded(folder, tested)
        if described not in known:
            known.append(described)
            other = _data_of(folder)
            if other is not None:
                _refuse(other, tested, str(folder))


def _stages(run: Path) -> list[Path]:
    """Returns the folders of the stages that trained or wrote texts."""
    state = RunState.load(run)
    if state is None:
        return [find_stage(run).folder]
    records = state.stages.values()
    return [run / r.folder for r in records if r.status == "finished" and r.command[:1] in (["fit"], ["predict"])]


def _lineage(stages: Sequence[Path]) -> dict[Path, Mapping[str, Any]]:
    """Returns the configurations of stages, and of those whose weights or texts they took, and so on, by folder."""
    found: dict[Path, Mapping[str, Any]] = {}
    waiting = [folder.resolve() for folder in stages]
    while waiting:
        folder = waiting.pop(0)
        if folder in found:
            continue
        if not (folder / CONFIG_FILE).is_file():
            print(f"{folder}: no {CONFIG_FILE}, so its clips cannot be compared with the test clips", file=sys.stderr)
            continue
        found[folder] = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        init = found[folder].get("model", {}).get("init_args") or {}
        taken = [path for key in _TAKEN if (path := init.get(key)) is not None]
        paths = [path for one in taken for path in (one if isinstance(one, list) else [one])]
        waiting += [Path(path).resolve().parent for path in paths]
    return found


def _described(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the data section of a stage, without what does not change which clips it trains on."""
    data = dict(config.get("data") or {})
    init = data.get("init_args") or {}
    return data | {"init_args": {key: value for key, value in init.items() if key not in _NOT_TRAINED_ON}}


def _data_of(folder: Path) -> VideoDataModule | None:
    """Returns the data module of a stage, set up; None, with a line, if its clips are not where it had them."""
    try:
        with quietly():
            data = build_stage("test", ["--config", str(folder / CONFIG_FILE)]).data
            if not isinstance(data, VideoDataModule):
                return None
            data.setup("test")
    except (ValueError, OSError, ArgumentError) as error:
        print(f"{folder}: cannot be compared with the test clips, its own are not found ({error})", file=sys.stderr)
        return None
    return data


def _check_recorded(folder: Path, tested: Sequence[Clip]) -> None:
    """Compares test clips with the splits that a stage made: a manifest that grew since may be split otherwise."""
    path = folder / SPLITS_FILE
    if not path.is_file():
        return
    with path.open(encoding="utf-8", newline="") as file:
        used = {row["video_id"]: row["split"] for row in csv.DictReader(file) if row["split"] in USED_SPLITS}
    both = [f"{clip.video_id} was in {used[clip.video_id]}" for clip in tested if clip.video_id in used]
    if both:
        raise ValueError(
            f"{path}: {len(both)} of the test clips were not in the test when the stage ran: {first_five(both)}; give "
            "the clips the splits of this file (a column split), and evaluate again"
        )


def _refuse(data: VideoDataModule, tested: Sequence[Clip], where: str) -> None:
    seen = {_content(clip): (split, clip) for split in USED_SPLITS for clip in data.clips(split)}
    both = [(clip, *seen[key]) for clip in tested if (key := _content(clip)) in seen]
    if both:
        listed = [f"{clip.video_id} is {known.video_id} of {split}" for clip, split, known in both]
        splits = ", ".join(dict.fromkeys(clip.split for clip, _, _ in both))
        raise ValueError(
            f"{len(both)} clips of {splits} have the same content as clips that {where} has used: "
            f"{first_five(listed)}; take them out of the test (`vidreason data check` lists them) and evaluate again"
        )


def _content(clip: Clip) -> tuple[str, object]:
    """Returns what a clip shows, as a key: the hash of its file, and its stretch of it."""
    return content_sha(clip.path) if clip.path.exists() else clip.video_id, clip.stretch
