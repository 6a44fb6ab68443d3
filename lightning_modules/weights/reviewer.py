"""Two adapters on one base: the policy that writes traces, and the calibrator that reviews them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.adapters import (
    LoRAOptions,
    attach_lora,
    copy_adapter,
    load_adapter,
    save_adapter,
    use_adapter,
)
from vidreason.lightning_modules.vlms.loading.building import POLICY
from vidreason.lightning_modules.weights.export import StartingWeights
from vidreason.run_folder import ADAPTER_FOLDER

CALIBRATOR = "calibrator"
"""Name of the calibrator's adapter in memory."""


@dataclass(frozen=True)
class ReviewerPair:
    """How a calibrator is put beside its policy on one base in memory.

    The calibrator starts as a copy of the policy's adapter (DeepIntuit, arXiv 2603.10300, has two full models); after
    full fine-tuning, where the policy has no adapter, it starts as a fresh one on the policy's weights.
    """

    vlm: VLM
    lora: LoRAOptions
    """Size of the calibrator's adapter where the policy has none."""

    @property
    def adapter_options(self) -> LoRAOptions:
        """Size of the calibrator's adapter."""
        return self.vlm.lora or self.lora

    def attach(self, model: nn.Module, calibrator_path: str | None) -> PeftModel:
        """Puts the calibrator on a model that holds the policy, and makes it the active and only trainable adapter.

        Args:
            model: What ``VLM.build`` returned for the policy.
            calibrator_path: A calibrator's folder to load; None starts a new one.
        """
        if calibrator_path is not None:
            model = load_adapter(model, calibrator_path, CALIBRATOR)
        elif isinstance(model, PeftModel):
            copy_adapter(model, POLICY, CALIBRATOR, trainable=True)
        else:
            assert isinstance(model, PreTrainedModel)
            frozen = self.vlm.vision_modules if self.vlm.freeze_vision else ()
            model = attach_lora(model, self.lora, CALIBRATOR, frozen)
        assert isinstance(model, PeftModel)
        model.set_adapter(CALIBRATOR)
        return model

    @contextmanager
    def policy_active(self, model: nn.Module) -> Iterator[None]:
        """Within the block the policy runs, not the calibrator; which weights are trainable does not change."""
        assert isinstance(model, PeftModel)
        with use_adapter(model, POLICY if POLICY in model.peft_config else None):
            yield


def policy_reference(start: StartingWeights, folder: Path, run_dir: Path) -> str | None:
    """Returns where the policy of a calibrator lies, relative to the calibrator's folder.

    Args:
        start: The policy's weights.
        folder: The calibrator's folder.
        run_dir: The run folder, whose ``adapter/`` holds a copy of the policy's adapter.

    Returns:
        ``policy`` for the copy inside, a relative path for full weights or another folder, None for the base.
    """
    if start.path is None:
        return None
    if folder == run_dir / ADAPTER_FOLDER and not start.full:
        return POLICY
    return os.path.relpath(Path(start.path).resolve(), folder.resolve())


def export_reviewer(model: nn.Module, start: StartingWeights, run_dir: Path, info: dict[str, object]) -> Path:
    """Writes the calibrator to ``run_dir/adapter``, with a copy of the policy's adapter inside."""
    folder = run_dir / ADAPTER_FOLDER
    beside = {POLICY: Path(start.path)} if start.path is not None and not start.full else {}
    save_adapter(model, folder, CALIBRATOR, info, beside)
    return folder
