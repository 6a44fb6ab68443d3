"""The folder that ``vidreason export`` writes, checked and loaded without the run, its data and its code.

::

    DIR/                       a PEFT adapter, or a model folder
      vidreason.json           lineage, inputs, and the entry ``export`` (``recipe.py``)
      task.yaml                classes and prompts
      clips.json               ids of the run's clips by content; may be deleted
      README.md                model card
      policy/                  the weights that write the traces which those in DIR review
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vidreason.answering.export_form import check_entry
from vidreason.answering.loaded import LoadedModel, one_device, random_state_restored
from vidreason.answering.recipe import build_decider, build_generator, build_vlm, with_policy
from vidreason.config.quiet import quietly
from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.time_limit import call_reader
from vidreason.datamodules.file_hash import content_sha
from vidreason.datamodules.task import Task
from vidreason.datamodules.types import Clip
from vidreason.lightning_modules.decisions.threshold import Threshold
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.loading.weight_folders import (
    INFO_FILE,
    adapter_sha,
    is_adapter_folder,
)
from vidreason.lightning_modules.weights.answering import Answering
from vidreason.lightning_modules.weights.reviewer import ReviewerPair
from vidreason.run_folder import TASK_FILE

EXPORT_VERSION = 1
CLIPS_FILE = "clips.json"
POLICY_FOLDER = "policy"
BASE_WEIGHTS = "base "
"""How the entry ``run.weights`` begins if the base itself decides; its hash follows."""
EMBEDDED = "embedded"
"""Name of the base that comes with the package."""
_AGAIN = "export the run again, or copy the folder again"


@dataclass(frozen=True)
class ExportInfo:
    """The entry ``export`` of ``vidreason.json``."""

    version: int
    run: Mapping[str, str]
    """Name of the run and its stage, hashes of the task and of the weights that decide and write traces in the run: an
    export may be replaced by one of the same run."""
    vlm: Mapping[str, Any]
    decide: Mapping[str, Any]
    frames: Mapping[str, Any]
    base: Mapping[str, str | None]
    """``name`` of the base and its ``path`` relative to the folder; the path is null for a hub id."""
    merged: bool
    precision: str
    weights_sha: str
    policy_sha: str | None
    """Hash of the weights in ``policy/``; null without."""
    threshold: Mapping[str, Any] | None
    check: Mapping[str, float | int]
    """Largest difference of log-probabilities between the run and the folder, and what it was measured on."""

    @classmethod
    def read(cls, folder: Path) -> ExportInfo:
        """Reads the entry.

        Raises:
            ValueError: If the folder is no export, or its file is damaged.
        """
        file = folder / INFO_FILE
        if not file.is_file():
            raise ValueError(
                f"{folder}: no export of vidreason (no {INFO_FILE} in it); give the --out of a vidreason export"
            )
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: damaged ({error}); {_AGAIN}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{file}: a {type(content).__name__} and not a mapping; {_AGAIN}")
        if "export" not in content:
            raise ValueError(f"{folder}: weights of a run and no export; export its run: vidreason export")
        entry = content["export"]
        version = entry.get("version") if isinstance(entry, dict) else None
        if version != EXPORT_VERSION:
            raise ValueError(f"{file}: export version {version!r}, this program reads {EXPORT_VERSION}; {_AGAIN}")
        check_entry(entry, file, _AGAIN)
        return cls(**entry)

    def entry(self) -> dict[str, object]:
        """Returns the entry as JSON holds it."""
        return asdict(self)


class ExportedClips:
    """The clips of the run's data set as ``clips.json`` lists them, by their content.

    Args:
        file: The file; without it no clip is known.
        timeout: Seconds that reading one clip may take.
    """

    def __init__(self, file: Path, timeout: float | None) -> None:
        self._timeout = timeout
        try:
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{file}: damaged ({error}); delete it, or {_AGAIN}") from error
        wrong = next(filter(None, map(_wrong_clip, found.items())), "") if isinstance(found, dict) else "no mapping"
        if wrong:
            raise ValueError(f"{file}: damaged ({wrong}); delete it, or {_AGAIN}")
        self._known: dict[str, Any] = found

    def find(self, path: Path) -> Clip | None:
        """Returns the clip with the content of a file, or None."""
        if not self._known:
            return None
        try:
            entry = self._known.get(call_reader(content_sha, path, timeout=self._timeout))
        except (DecodeError, OSError):
            return None
        return None if entry is None else Clip(path, None, entry["id"], fields=entry["fields"])


def _wrong_clip(item: tuple[str, object]) -> str:
    """Returns what is wrong with an entry of ``clips.json``; empty if it is as it should be."""
    key, entry = item
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
        return f"{key} has no id"
    fields = entry.get("fields")
    texts = isinstance(fields, dict) and all(isinstance(value, str) for value in fields.values())
    return "" if texts else f"fields of {key} are no mapping of texts"


def load_export(folder: Path, base: str | None = None) -> LoadedModel:
    """Loads an exported folder.

    Args:
        folder: The folder.
        base: Folder or hub id of the base of an adapter; None takes the one that the folder names.

    Raises:
        ValueError: If the folder is damaged, or the base is not that of the adapter.
    """
    info = ExportInfo.read(folder)
    task = Task.from_yaml(folder / TASK_FILE) if (folder / TASK_FILE).is_file() else None
    if task is None or task.sha() != info.run.get("task_sha"):
        what = "is missing" if task is None else "was changed"
        raise ValueError(f"{folder / TASK_FILE}: {what}; {_AGAIN}")
    _check_weights(folder, info.weights_sha)
    if info.policy_sha is not None:
        _check_weights(folder / POLICY_FOLDER, info.policy_sha)
    try:
        frames, decider = FrameOptions(**info.frames), build_decider(info.decide, task)
        threshold = None if info.threshold is None else Threshold(**info.threshold)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{folder / INFO_FILE}: damaged ({error!r}); {_AGAIN}") from error
    try:
        fabric = one_device("auto", info.precision)
    except ValueError as error:
        raise ValueError(f"{folder / INFO_FILE}: export.precision is {info.precision!r}; {_AGAIN}") from error
    with torch.inference_mode(), quietly(), random_state_restored():
        try:
            answering = _load_models(folder, info, task, base, fabric.device)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder}: its weights cannot be read ({error}); {_AGAIN}") from error
    return LoadedModel(
        answering=Answering(**{**answering, "decider": decider}, clips_per_forward=info.decide["clips_per_forward"]),
        task=task,
        frames=frames,
        seed=info.decide["seed"],
        find_known=ExportedClips(folder / CLIPS_FILE, frames.timeout).find,
        answers=f"stage {info.run['stage']} of {info.run['name']}, exported ({folder})",
        threshold=threshold,
        fabric=fabric,
        weights_sha=info.weights_sha,
        precision=info.precision,
        base=partial(_replaced_base, folder, info, base) if _is_replaced(folder, info) else None,
    )


def _is_replaced(folder: Path, info: ExportInfo) -> bool:
    """Returns whether no model of an export holds the base."""
    if info.run["weights"].startswith(BASE_WEIGHTS):
        return False
    policy = folder / POLICY_FOLDER
    return not is_adapter_folder(folder) or (info.policy_sha is not None and not is_adapter_folder(policy))


def _replaced_base(folder: Path, info: ExportInfo, base: str | None) -> VLM:
    """Returns the family of the base that the weights of an export have replaced.

    Raises:
        ValueError: If it is not there, or another one.
    """
    path = base or _find_base(folder, info)
    vlm = build_vlm(info.vlm, path, None, cached=False)
    # A calibrator's entry is the hash of the weights that it was trained on.
    if info.decide["by"] != "review" and _base_sha(folder) not in (None, vlm.base_sha()):
        raise ValueError(f"{folder}: was trained on another base than {path}; give its own: base=FOLDER")
    return vlm


def _load_models(folder: Path, info: ExportInfo, task: Task, base: str | None, device: torch.device) -> dict[str, Any]:
    """Returns the family, the models and the generator of ``Answering``."""
    policy = folder / POLICY_FOLDER if info.policy_sha is not None else None
    reviews = info.decide["by"] == "review"
    full_policy = policy is not None and not is_adapter_folder(policy)
    if not is_adapter_folder(folder):
        # Two whole models have a family each; the caches of their towers must not meet.
        vlm = build_vlm(info.vlm, str(folder), None, cached=policy is None)
        model = vlm.build().to(device).eval()
        writer_vlm = vlm if policy is None else build_vlm(info.vlm, str(policy), None, cached=False)
        writer = None if policy is None else writer_vlm.build().to(device).eval()
        generator = build_generator(info.decide, task, writer_vlm, info.policy_sha or "")
        return {"vlm": vlm, "model": model, "generator": generator, "policy": writer}
    path = str(policy) if full_policy else base or _find_base(folder, info)
    own = policy if reviews and not full_policy else None if reviews else folder
    # As in the run, a base in 4 bits gets the adapter of a policy that has learnt nothing.
    options = folder if own is None and info.vlm.get("quantize") == "nf4" else own
    vlm = build_vlm(info.vlm, path, options)
    if not full_policy and (told := _base_sha(folder)) is not None and told != vlm.base_sha():
        raise ValueError(f"{folder}: its adapter was trained on another base than {path}; give its own: base=FOLDER")
    model = vlm.build(None if own is None else str(own))
    generator = build_generator(info.decide, task, vlm, info.policy_sha or "")
    if reviews:
        pair = ReviewerPair(vlm, LoRAOptions())
        model = pair.attach(model, str(folder))
        generator = None if generator is None else with_policy(generator, pair.policy_active)
    return {"vlm": vlm, "model": model.to(device).eval(), "generator": generator}


def _find_base(folder: Path, info: ExportInfo) -> str:
    """Returns the base that an export names.

    Raises:
        ValueError: If it is a folder that is not there.
    """
    name, path = info.base.get("name"), info.base.get("path")
    if path is None:
        return str(name)
    found = folder / path
    if not (found / "config.json").is_file():
        raise ValueError(f"{folder}: its base {name} is not at {found}; name its folder: base=FOLDER")
    return str(found.resolve())


def _base_sha(folder: Path) -> str | None:
    found = json.loads((folder / INFO_FILE).read_text(encoding="utf-8")).get("base_sha")
    return None if found is None else str(found)


def _check_weights(folder: Path, sha: str) -> None:
    """Checks that the weights in a folder are those that were exported.

    Raises:
        ValueError: If they are missing or others; the message names the folder.
    """
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: its weights are missing (*.safetensors); {_AGAIN}")
    try:
        found = adapter_sha(folder)
    except (ValueError, KeyError, TypeError):  # of adapter_config.json
        found = ""
    if found != sha:
        raise ValueError(f"{folder}: its weights or their configuration are damaged or were replaced; {_AGAIN}")
