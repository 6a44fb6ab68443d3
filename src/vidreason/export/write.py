"""Writes the model of a run to a folder, and checks that it gives what the run gave."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vidreason.answering.exported import (
    CLIPS_FILE,
    EMBEDDED,
    EXPORT_VERSION,
    POLICY_FOLDER,
    ExportInfo,
    load_export,
)
from vidreason.answering.loaded import OpenedRun
from vidreason.answering.recipe import describe_decider, describe_vlm
from vidreason.config.finished_stage import find_stage
from vidreason.datamodules.types import Clip
from vidreason.export.card import CardFacts, write_card
from vidreason.export.check import CLIPS, probe
from vidreason.export.clips import write_clips
from vidreason.export.script import Kinds, card_script
from vidreason.export.weights import copy_adapter_folder, copy_model_folder, write_companions, write_model
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.weight_folders import (
    INFO_FILE,
    adapter_sha,
    is_adapter_folder,
    published,
    read_info,
)
from vidreason.lightning_modules.vlms.tiny.vlm import embedded_folder
from vidreason.lightning_modules.weights.lineage import REVIEWED, Lineage
from vidreason.lightning_modules.weights.model_inputs import describe_inputs
from vidreason.run_folder import TASK_FILE

TOLERANCE = 1e-4
"""Largest difference of log-probabilities in fp32, in nats, that is rounding."""


@dataclass(frozen=True)
class Exported:
    """The result of an export, as the command line prints it."""

    folder: Path
    merged: bool
    difference: float
    """Largest difference of a log-probability, in nats."""
    known_clips: int
    left_clips: int
    """Clips of the data set that were not hashed."""


def export_run(run: Path, stage: str | None, out: Path, merge: bool, force: bool) -> Exported:
    """Exports the model of a run.

    Args:
        run: Run folder of a pipeline or of a stage.
        stage: Stage of the pipeline; None is what it tested last.
        out: Folder to write.
        merge: Whether to write whole models and no adapters.
        force: Whether to move a folder away that is no export of this run.

    Raises:
        ValueError: If the run has not finished, cannot be exported, or the folder holds something else; or if the
            folder does not give what the run gave.
    """
    out = Path(os.path.abspath(out))  # "." has no name
    found = find_stage(run, stage)
    opened = OpenedRun.of(found)
    identity = _identity(run, opened)
    if not found.weights and not merge:
        raise ValueError(f"--run {run}: its model is the base, untrained; give --merge to write the whole model")
    moved = _make_room(out, identity, force)
    with ExitStack() as on_failure:
        if moved is not None:
            on_failure.callback(moved.rename, out)
        entry = _entry(opened, identity, merge, out)
        before = _probed(opened)
        info = _lineage(opened, entry)
        with published(out, info) as draft:
            _write_weights(opened, draft, merge)
            policy = draft / POLICY_FOLDER
            sampling = _sampling(entry.decide)
            frames = opened.data.frames.num_frames
            for folder in filter(Path.is_dir, (draft, policy)):
                if folder == draft or not is_adapter_folder(folder):
                    write_companions(opened.module.vlm, frames, sampling, folder)
            opened.task.to_yaml(draft / TASK_FILE)
            known, left = write_clips(opened, draft / CLIPS_FILE)
            policy_sha = adapter_sha(policy) if policy.is_dir() else None
            entry = replace(entry, weights_sha=adapter_sha(draft), policy_sha=policy_sha)
            info["export"] = entry.entry()
            (draft / INFO_FILE).write_text(json.dumps(info), encoding="utf-8")
            after = probe(load_export(draft))
            difference = float((after - before).abs().max())
            _check_difference(opened, merge, difference, out)
            entry = replace(entry, check={"difference": difference, "values": len(before), "clips": CLIPS})
            info["export"] = entry.entry()
            kinds = Kinds(_kind(draft), _kind(policy) if policy.is_dir() else None)
            _write_card(run, opened, entry, kinds, info, draft)
        on_failure.pop_all()  # the new folder stands: the old one stays where it went
    return Exported(out, merge, difference, known, left)


def _identity(run: Path, opened: OpenedRun) -> dict[str, str]:
    """Returns what tells a run from others, also from one of the same name elsewhere and from a later training."""
    weights = opened.stage.weights
    policy = opened.module.adapter_path if describe_decider(opened)["by"] == "review" else None
    return {
        "name": run.resolve().name,
        "stage": opened.module.stage_name,
        "task_sha": opened.task.sha(),
        "weights": adapter_sha(weights[-1]) if weights else f"base {opened.module.vlm.base_sha()}",
        "policy": "" if policy is None else adapter_sha(policy),
    }


def _make_room(out: Path, identity: dict[str, str], force: bool) -> Path | None:
    """Moves a folder away that may not be replaced, if forced; returns where it went.

    Raises:
        ValueError: If the folder holds something else than an export of this run.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        own = dict(ExportInfo.read(out).run) == identity
        why = "an export of another run, stage, task or training"
    except ValueError:
        own, why = False, "something else than an export"
    if own:
        return None
    old = out.with_name(f"{out.name}.old")
    if not force:
        raise ValueError(f"--out {out}: holds {why}; give another folder, or --force to move it to {old.name}")
    if old.exists():
        raise ValueError(f"--out {out}: --force would move it to {old}, which exists; move that away first")
    out.rename(old)
    return old


def _entry(opened: OpenedRun, identity: dict[str, str], merge: bool, out: Path) -> ExportInfo:
    vlm, weights = opened.module.vlm, opened.stage.weights
    whole = merge or not is_adapter_folder(weights[-1])
    embedded = Path(vlm.path) == embedded_folder()
    local = Path(vlm.path).exists() and not embedded
    path = os.path.relpath(Path(vlm.path).resolve(), out.resolve()) if local else None
    frames = {**asdict(opened.data.frames), "cache": None}
    return ExportInfo(
        version=EXPORT_VERSION,
        run=identity,
        vlm=describe_vlm(vlm, merged=whole),
        decide=describe_decider(opened),
        frames=frames,
        base={"name": EMBEDDED if embedded else Path(vlm.path).name if local else vlm.path, "path": path},
        merged=merge,
        precision=opened.precision,
        weights_sha="",
        policy_sha=None,
        threshold=None if opened.threshold is None else asdict(opened.threshold),
        check={},
    )


def _lineage(opened: OpenedRun, entry: ExportInfo) -> dict[str, object]:
    """Returns ``vidreason.json``: that of the run's weights, with what they are asked and the entry ``export``."""
    module, task, weights = opened.module, opened.task, opened.stage.weights
    found = read_info(weights[-1]) if weights else {}
    if not found:
        names, definitions = task.label_names, tuple(spec.definition for spec in task.classes)
        base = Lineage(module.stage_name, module.vlm.base_sha(), "", task.sha(), names, definitions, module.seed, 0)
        found = base.info()
    found = deepcopy(found)
    frames = replace(opened.data.frames, cache=None)
    found["inputs"] = describe_inputs(module.vlm, frames, module.decider(task).view)
    if entry.decide["by"] == "review":
        view = module.trace_generator(task, "reason").view
        found["policy_inputs"] = describe_inputs(module.vlm, frames, view)
        found[REVIEWED] = POLICY_FOLDER if entry.merged or module.adapter_path is not None else None
    if module.vlm.note is not None:
        found["note"] = module.vlm.note
    found["export"] = entry.entry()
    return found


def _probed(opened: OpenedRun) -> torch.Tensor:
    """Returns the log-probabilities of the run's own model, which is released again."""
    found = probe(opened.load())
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _write_weights(opened: OpenedRun, draft: Path, merge: bool) -> None:
    """Writes the weights that decide to ``draft``, and those that write traces to ``draft/policy``."""
    vlm, weights = opened.module.vlm, opened.stage.weights
    own = weights[-1] if weights else None
    reviews = describe_decider(opened)["by"] == "review"
    policy, hub = opened.module.adapter_path if reviews else None, None if Path(vlm.path).exists() else vlm.path
    if not merge:
        assert own is not None, "the base alone is only exported as a whole"
        if is_adapter_folder(own):
            copy_adapter_folder(Path(own), draft, hub)
        else:
            copy_model_folder(Path(own), draft)
        if policy is not None and is_adapter_folder(policy):
            copy_adapter_folder(Path(policy), draft / POLICY_FOLDER, hub)
        elif policy is not None:
            copy_model_folder(Path(policy), draft / POLICY_FOLDER)
        return
    if not reviews:
        write_model(vlm, own, None, draft)
        return
    write_model(vlm, None if policy is None or is_adapter_folder(policy) else policy, own, draft)
    write_model(vlm, policy, None, draft / POLICY_FOLDER)


def _kind(folder: Path) -> str:
    return "adapter" if is_adapter_folder(folder) else "model"


def _sampling(decide: Any) -> Sampling | None:
    return Sampling(**decide["sampling"]) if "sampling" in decide else None


def _check_difference(opened: OpenedRun, merge: bool, difference: float, out: Path) -> None:
    """Checks that only rounding changes log-probabilities, where the weights are the same numbers in fp32.

    Raises:
        ValueError: If more does, or, in any precision, if one is NaN or infinite.
    """
    vlm = opened.module.vlm
    if not math.isfinite(difference):
        raise ValueError(
            f"--out {out}: log-probabilities of the run or of the written model are not finite, so nothing is written; "
            "use weights of a stage that trained well, or a wider vlm.dtype"
        )
    exact = vlm.dtype == "float32" or (vlm.dtype == "auto" and not torch.cuda.is_available())
    if exact and not (merge and vlm.quantize == "nf4") and difference > TOLERANCE:
        raise ValueError(
            f"--out {out}: log-probabilities of the written model differ by {difference:.2g} from those of the run, "
            "so nothing is written; report this with the config of the run"
        )


def _data_sha(clips: Sequence[Clip]) -> str:
    """Returns the hash of ids, splits and labels of all clips."""
    lines = sorted(f"{clip.split}\t{clip.video_id}\t{clip.label}" for clip in clips)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _write_card(
    run: Path, opened: OpenedRun, entry: ExportInfo, kinds: Kinds, info: dict[str, object], draft: Path
) -> None:
    module = opened.module
    shows = getattr(module.decider(opened.task).view, "shows_video", True)
    facts = CardFacts(
        run=run,
        stage_folder=opened.stage.folder,
        task=opened.task,
        info=info,
        entry=entry,
        kinds=kinds,
        clips=opened.clips,
        data_sha=_data_sha(opened.clips) if opened.clips else None,
        script=card_script(entry, kinds, module.vlm, shows),
        four_bit=module.vlm.quantize == "nf4",
    )
    write_card(draft, facts)
