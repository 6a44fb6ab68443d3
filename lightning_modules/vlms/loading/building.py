"""Builds a model for training from a folder or hub id: loading, 4-bit weights, freezing, adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from peft import PeftModel
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from vidreason.datamodules.file_hash import files_sha
from vidreason.lightning_modules.functional.finite import check_weights
from vidreason.lightning_modules.vlms.loading.adapters import (
    BAD_WEIGHTS,
    LoRAOptions,
    attach_lora,
    load_adapter,
    reached_layers,
)
from vidreason.lightning_modules.vlms.loading.weight_folders import INFO_FILE, is_adapter_folder, read_info

POLICY = "policy"
"""Name of the adapter that a stage trains."""
ATTENDING = ("", "text_config", "vision_config")
"""Parts of a configuration to which ``attn_implementation`` applies."""
CHECKPOINT_FILES = frozenset({".json", ".safetensors", ".jinja", ".txt", ".model"})


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Raises errors of the hub as a ValueError of one line that contains the remedy."""
    local = path.startswith((".", "/", "~")) or Path(path).exists()
    if local and not (Path(path) / "config.json").is_file():
        raise ValueError(f"vlm.path: {path} is not a model folder (no config.json in it); check the path")
    try:
        yield
    except OSError as error:
        remedy = (
            "its files are incomplete; copy or download it again"
            if local
            else "it is not on this machine and the hub did not give it; check the name and the network, or run "
            f"`hf download {path}` elsewhere and set vlm.path to that folder"
        )
        raise ValueError(f"vlm.path: cannot load {path}: {remedy} ({str(error).splitlines()[0]})") from error


def build(
    path: str,
    adapter_path: str | None,
    *,
    lora: LoRAOptions | None,
    nf4: bool,
    frozen: tuple[str, ...],
    unquantised: tuple[str, ...],
    dtype: str,
    attn_implementation: str,
    gradient_checkpointing: bool,
    base_sha: Callable[[], str],
) -> nn.Module:
    """Builds a model in train mode, with frozen modules in eval mode; ``VLM`` documents the arguments."""
    path, adapter = _sources(path, adapter_path, lora, base_sha)
    base = load_base(path, nf4=nf4, unquantised=unquantised, dtype=dtype, attn_implementation=attn_implementation)
    if path == adapter_path:
        check_weights(dict(base.named_parameters()), f"adapter_path: {path}", BAD_WEIGHTS)
    return equip(base, adapter, lora=lora, frozen=frozen, gradient_checkpointing=gradient_checkpointing)


def equip(
    base: PreTrainedModel,
    adapter: str | None,
    *,
    lora: LoRAOptions | None,
    frozen: tuple[str, ...],
    gradient_checkpointing: bool,
) -> nn.Module:
    """Prepares a base for training: frozen modules in eval mode, the ``policy`` adapter, train mode elsewhere."""
    if gradient_checkpointing:
        # transformers has renamed this method.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    towers = [base.get_submodule(name) for name in frozen]
    for tower in towers:
        tower.requires_grad_(False)
    model: nn.Module = base
    if adapter is not None:
        model = load_adapter(base, adapter, POLICY, options=lora)
    elif lora is not None:
        model = attach_lora(base, lora, POLICY, frozen)
    if isinstance(model, PeftModel):
        rank_zero_info(f"LoRA changes {reached_layers(model, POLICY)}")
    model.train()
    for tower in towers:
        tower.eval()
    return model


def _sources(
    path: str, adapter_path: str | None, lora: LoRAOptions | None, base_sha: Callable[[], str]
) -> tuple[str, str | None]:
    """Returns which weights to load and which adapter to attach."""
    if adapter_path is None:
        return path, None
    if not is_adapter_folder(adapter_path):
        if not (Path(adapter_path) / "config.json").is_file():
            raise ValueError(
                f"adapter_path: {adapter_path} is neither an adapter folder (adapter_config.json) nor a folder of "
                "full weights (config.json); give the adapter/ or weights/ folder of a finished stage"
            )
        _check_adapter_base(path, adapter_path, base_sha)
        return adapter_path, None
    if lora is None:
        raise ValueError(
            f"adapter_path: {adapter_path} is a LoRA adapter, but vlm.lora is null; set it as it was trained"
        )
    _check_adapter_base(path, adapter_path, base_sha)
    return path, adapter_path


def _check_adapter_base(path: str, adapter_path: str, base_sha: Callable[[], str]) -> None:
    trained_on = read_info(adapter_path).get("base_sha")
    if trained_on is not None and trained_on != base_sha():
        raise ValueError(
            f"adapter_path: {adapter_path} was trained on another base than {path}; set vlm.path to its base"
        )


def load_base(
    path: str, *, nf4: bool, unquantised: tuple[str, ...], dtype: str, attn_implementation: str
) -> PreTrainedModel:
    """Loads the checkpoint at ``path`` in the given precision, with 4-bit weights if ``nf4``."""
    precision = _dtype(dtype)
    quantization = None
    if nf4:
        if find_spec("bitsandbytes") is None:
            raise ValueError(
                "vlm.quantize is nf4, but bitsandbytes is not installed: `pip install bitsandbytes`, or hold the base "
                "in its precision: configs/strategy/lora.yaml, with configs/strategy/fsdp.yaml where it must be sharded"
            )
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=precision,
            # FSDP can shard packed weights only if they are stored in the dtype of the other weights.
            bnb_4bit_quant_storage=precision if precision == torch.bfloat16 else torch.uint8,
            llm_int8_skip_modules=list(unquantised),
        )
    with readable(path):
        model = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=precision,
            # Audio towers, which get no input here, do not support every attention.
            attn_implementation=dict.fromkeys(ATTENDING, attn_implementation) | {"audio_config": "eager"},
            quantization_config=quantization,
            # bitsandbytes quantises while weights are moved to the GPU.
            device_map={"": torch.cuda.current_device()} if nf4 and torch.cuda.is_available() else None,
        )
    assert isinstance(model, PreTrainedModel)
    if nf4:
        _keep_trainable_on_cpu(model)
        experts = {name: p.numel() for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3}
        if experts:  # bitsandbytes quantises linear layers, and these are stacked in one parameter
            rank_zero_warn(
                f"vlm.quantize: nf4 leaves the experts in {str(precision).removeprefix('torch.')}: "
                f"{sum(experts.values()) / 1e6:.3g} M parameters, for example {next(iter(experts))}"
            )
    return model


def _keep_trainable_on_cpu(model: PreTrainedModel) -> None:
    """Disables the weight packing that bitsandbytes does in eval forwards on AVX-512 CPUs, which removes gradients."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def checkpoint_sha(path: str) -> str:
    """Returns the SHA-256 of a checkpoint's files: weights, configuration, tokenizer, chat template."""
    with readable(path):
        config = cached_file(path, "config.json")
    assert config is not None
    files = sorted(Path(config).parent.iterdir())
    # vidreason.json describes the run, not the weights.
    return files_sha(file for file in files if file.suffix in CHECKPOINT_FILES and file.name != INFO_FILE)


def _dtype(name: str) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32
