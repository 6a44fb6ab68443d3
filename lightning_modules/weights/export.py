"""The weights that a stage starts from, and the weights that it exports to ``adapter/`` or ``weights/``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from vidreason.lightning_modules.vlms.loading.adapters import save_adapter
from vidreason.lightning_modules.vlms.loading.building import POLICY
from vidreason.lightning_modules.vlms.loading.weight_folders import adapter_sha, is_adapter_folder, save_weights
from vidreason.run_folder import ADAPTER_FOLDER, WEIGHTS_FOLDER


@dataclass(frozen=True)
class StartingWeights:
    """The weights that a stage starts from; read once, since the stage may later write to the same folder."""

    path: str | None
    """The ``adapter/`` or ``weights/`` of an earlier stage; None is the base."""
    sha: str
    """SHA-256 of the weights; empty for the base."""
    full: bool
    """True if the folder holds all weights of a model and not an adapter."""

    @classmethod
    def read(cls, path: str | None) -> StartingWeights:
        """Reads the folder of the option ``adapter_path``."""
        if path is None:
            return cls(None, "", full=False)
        return cls(path, adapter_sha(path), full=not is_adapter_folder(path))


def export_weights(model: nn.Module, run_dir: Path, info: Mapping[str, object], processor: Any) -> Path:
    """Writes the trained weights of a model for the next stage.

    Args:
        model: The base with its adapter ``policy``, or a fully fine-tuned model.
        run_dir: The run folder.
        info: Content of ``vidreason.json``.
        processor: The base's processor, written beside full weights.

    Returns:
        ``run_dir/adapter``, or after full fine-tuning ``run_dir/weights``, a model folder.
    """
    folder = run_dir / folder_name(model)
    if isinstance(model, PeftModel):
        save_adapter(model, folder, POLICY, info)
    else:
        assert isinstance(model, PreTrainedModel)
        save_weights(model, folder, info, processor)
    return folder


def folder_name(model: nn.Module) -> str:
    """Returns the name of the folder to which a model's trained weights are written."""
    return ADAPTER_FOLDER if isinstance(model, PeftModel) else WEIGHTS_FOLDER


def trained_state(module: nn.Module, state: Mapping[str, Tensor], kept: str | None = None) -> dict[str, Tensor]:
    """Returns the entries of a state dict that a checkpoint keeps: trained parameters and buffers of their modules.

    Args:
        module: The module of the state dict.
        state: The state dict.
        kept: Name of an adapter to keep although it is not trained.
    """
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    holders = {name.rpartition(".")[0] for name in trained}
    # For example the running statistics of a trained BatchNorm.
    trained |= {name for name, _ in module.named_buffers() if name.rpartition(".")[0] in holders}
    return {name: value for name, value in state.items() if name in trained or (kept and f".{kept}." in name)}
