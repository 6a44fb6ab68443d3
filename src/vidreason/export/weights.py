"""The files of an exported model: weights, processor and generation config, as other programs read them."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping
from copy import copy, deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from vidreason.lightning_modules.functional.finite import check_weights
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import BAD_WEIGHTS, WEIGHTS_FILE, load_adapter
from vidreason.lightning_modules.vlms.loading.weight_folders import CONFIG_FILE, is_adapter_folder
from vidreason.lightning_modules.vlms.text import chat

_TASK_TYPE = "CAUSAL_LM"
"""The ``task_type`` of PEFT for models that generate; without it, PeftModel and vLLM have to guess."""


def copy_adapter_folder(source: Path, target: Path, base: str | None) -> None:
    """Copies a PEFT adapter, with a configuration that names no place of this machine.

    Args:
        source: The adapter of a stage.
        target: Folder to write; it may exist.
        base: Hub id of the base; None if the base is a folder.

    Raises:
        ValueError: If a weight is not finite.
    """
    weights = load_file(source / WEIGHTS_FILE)
    check_weights(weights, str(source), BAD_WEIGHTS)
    target.mkdir(exist_ok=True)
    save_file(weights, target / WEIGHTS_FILE, {"format": "pt"})
    config = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base, "task_type": _TASK_TYPE, "inference_mode": True}
    if isinstance(config["target_modules"], list):
        config["target_modules"] = sorted(config["target_modules"])  # a set, in another order in every process
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_model(vlm: VLM, weights: str | None, adapter: str | None, target: Path) -> None:
    """Writes a whole model in full precision, into which an adapter is merged.

    Args:
        vlm: The family; ``quantize`` is ignored, so that an adapter of 4-bit weights is merged into full ones.
        weights: An adapter, or a folder of full weights that replaces the base; None is the base.
        adapter: An adapter that is merged in after ``weights``; None is no other.
        target: Folder to write; it may exist.

    Raises:
        ValueError: If a weight is not finite.
    """
    full = copy(vlm)
    full.quantize = "none"
    if weights is None or not is_adapter_folder(weights):
        full.lora = None
    with torch.no_grad():
        model: nn.Module = full.build(weights)
        if adapter is not None:
            model = load_adapter(model, adapter, "merged", trainable=False)
            assert isinstance(model, PeftModel)
            model.set_adapter("merged")
        if isinstance(model, PeftModel):
            model = model.merge_and_unload(adapter_names=list(model.active_adapters))
    assert isinstance(model, PreTrainedModel)
    # Buffers may be infinite on purpose: the clipping bounds of Gemma 4's audio tower are.
    check_weights(dict(model.named_parameters()), str(target), BAD_WEIGHTS)
    model.save_pretrained(target)
    del model
    gc.collect()


def copy_model_folder(source: Path, target: Path) -> None:
    """Copies the weights and configuration of a folder of full weights.

    Raises:
        ValueError: If a weight is not finite.
    """
    target.mkdir(exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.suffix == ".safetensors":
            check_weights(load_file(file), str(file), BAD_WEIGHTS)
        if file.name == "config.json" or file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json"):
            shutil.copyfile(file, target / file.name)


def write_companions(vlm: VLM, frames: int, sampling: Sampling | None, target: Path) -> None:
    """Writes the processor with the pixel limits of the run, the chat template and the generation config.

    Args:
        vlm: The model family.
        frames: Frames of a clip, for which limits over a whole video hold.
        sampling: How the stage samples texts; None is greedy.
        target: Folder to write.
    """
    processor = deepcopy(vlm.processor)
    video: Any = processor.video_processor
    for name, value in {"do_sample_frames": False, **vlm.video_options(vlm.frame_count(frames))}.items():
        old: Any = getattr(video, name, None)
        held_as_object = isinstance(value, Mapping) and old is not None and not isinstance(old, Mapping)
        setattr(video, name, type(old)(**value) if held_as_object else value)
    processor.save_pretrained(target)
    tokenizer, greedy = vlm.tokenizer, sampling is None or sampling.temperature == 0
    options: dict[str, object] = {"do_sample": False}
    if sampling is not None:
        options = {**asdict(sampling), "do_sample": not greedy, "temperature": sampling.temperature or 1.0}
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=chat.pad_id(vlm.processor),
        eos_token_id=sorted(vlm.stop_ids),
        suppress_tokens=sorted(vlm.suppressed_ids),
        repetition_penalty=1.0,  # that of the base, which may be another, is not what was trained
        **options,
    ).save_pretrained(target)
