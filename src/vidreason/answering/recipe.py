"""The recipe by which an exported model is built again: the entry ``export`` of its ``vidreason.json``.

It describes the model family and the decider by their options and names no class: the family follows from the
``model_type`` of the base, the decider from ``decide.by``. Both sides are here, so that they stay each other's inverse.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from vidreason.answering.export_form import VLM_OPTIONS
from vidreason.answering.loaded import OpenedRun
from vidreason.config.vlm_shorthand import family_class_path
from vidreason.datamodules.task import Task
from vidreason.lightning_modules.decisions.deciders import AnswerDecider, Decider, LikelihoodDecider, ReviewDecider
from vidreason.lightning_modules.traces.generation import TraceGenerator, TraceOptions, trace_view
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.loading.building import readable
from vidreason.lightning_modules.vlms.loading.weight_folders import CONFIG_FILE, INFO_FILE, is_adapter_folder
from vidreason.rewards.completion import CompletionForm


def describe_vlm(vlm: VLM, merged: bool) -> dict[str, object]:
    """Returns the model type of a family's checkpoint and the options that a loaded export needs.

    Args:
        vlm: The model family.
        merged: Whether the weights are written in full precision, whatever the run held them in.

    Raises:
        ValueError: If the family is a class of the user's own.
    """
    with readable(vlm.path):
        kind = str(AutoConfig.from_pretrained(vlm.path).model_type)
    name = f"{type(vlm).__module__}.{type(vlm).__qualname__}"
    if family_class_path(kind) != name:
        raise ValueError(
            f"export: the model family {name} is no part of vidreason, so that an exported folder could not name it; "
            "hand on the run folder with your class instead"
        )
    options = {option: getattr(vlm, option) for option in VLM_OPTIONS}
    return {"model_type": kind, **options, **({"quantize": "none"} if merged else {})}


def build_vlm(described: Mapping[str, Any], path: str, adapter: Path | None, cached: bool = True) -> VLM:
    """Returns the family that ``describe_vlm`` described.

    Args:
        described: The entry, whose form was checked.
        path: Folder or hub id of the model.
        adapter: Folder of a PEFT adapter with the options of the one that the model gets; None is a model without one.
        cached: Whether vision embeddings may be cached.

    Raises:
        ValueError: If no family has that model type or these options.
    """
    options = dict(described)
    class_path = family_class_path(str(options.pop("model_type", None)))
    if class_path is None:
        raise ValueError(f"model_type {described.get('model_type')!r} is of no family of this version")
    module, _, name = class_path.rpartition(".")
    family: type[VLM] = getattr(import_module(module), name)
    if not cached:
        options["vision_cache"] = None
    try:
        return family(path=path, lora=_lora_of(adapter), **options)
    except TypeError as error:
        raise ValueError(f"{INFO_FILE}: its model options are not those of this version ({error})") from error


def _lora_of(adapter: Path | None) -> LoRAOptions | None:
    if adapter is None or not is_adapter_folder(adapter):
        return None
    config = json.loads((adapter / CONFIG_FILE).read_text(encoding="utf-8"))
    return LoRAOptions(r=config["r"], alpha=config["lora_alpha"], use_rslora=bool(config.get("use_rslora", False)))


def describe_decider(opened: OpenedRun) -> dict[str, object]:
    """Returns how a stage decides.

    Raises:
        ValueError: If it decides by a class of the user's own.
    """
    module = opened.module
    decider = module.decider(opened.task)
    common: dict[str, object] = {"clips_per_forward": module.evaluation.clips_per_forward, "seed": module.seed}
    form = asdict(module.completion)
    if type(decider) is LikelihoodDecider:
        return {"by": "likelihood", **common}
    if type(decider) is AnswerDecider:
        return {
            "by": "answer",
            "samples": decider.samples,
            "sampling": asdict(decider.sampling),
            "form": form,
            **common,
            "seed": decider.seed,
        }
    if type(decider) is ReviewDecider:
        options = module.traces
        return {
            "by": "review",
            "input": decider.input,
            "temperature": decider.temperature,
            "samples": options.samples,
            "sampling": asdict(options.sampling),
            "form": form,
            **common,
        }
    raise ValueError(
        f"export: stage {module.stage_name} decides by {type(decider).__qualname__}, a class of your own; hand on the "
        "run folder with your class instead"
    )


def build_decider(described: Mapping[str, Any], task: Task) -> Decider:
    """Returns the decider that ``describe_decider`` described."""
    if described["by"] == "likelihood":
        return LikelihoodDecider(task)
    if described["by"] == "answer":
        sampling, form = Sampling(**described["sampling"]), CompletionForm(**described["form"])
        return AnswerDecider(task, described["samples"], sampling, described["seed"], form)
    if described["by"] == "review":
        return ReviewDecider(task, described["input"], described["temperature"])
    raise ValueError(f"decide.by is {described['by']!r}, which this version does not know")


def build_generator(described: Mapping[str, Any], task: Task, vlm: VLM, sha: str) -> TraceGenerator | None:
    """Returns the generator of the traces that a reviewer reads; None if the decider reads none.

    Args:
        described: The entry of ``describe_decider``.
        task: Classes and prompts.
        vlm: The family that encodes the clips.
        sha: SHA-256 of the policy's weights; empty for the base.
    """
    if described["by"] != "review" or described["input"] == "video":
        return None
    form = CompletionForm(**described["form"])
    options = TraceOptions(kind="reason", samples=described["samples"], sampling=Sampling(**described["sampling"]))
    view, size = trace_view(task, "reason", form=form), described["clips_per_forward"]
    return TraceGenerator(vlm, view, options, form, described["seed"], sha, task.sha(), size)


def with_policy(generator: TraceGenerator, activate: Any) -> TraceGenerator:
    """Returns a generator that activates the policy's adapter by ``activate(model)`` while it writes."""
    return replace(generator, adapter_context=activate)
