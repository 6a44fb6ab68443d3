"""The calibrator's weights beside the policy's: from what they start, which of the two writes, what is handed on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_modules.calibrator_info import CalibratorInfo, CalibratorInput, calibrator_extra
from vidreason.lightning_modules.lineage import Lineage
from vidreason.lightning_modules.own_traces import TraceOptions
from vidreason.lightning_modules.rollout import Completion
from vidreason.lightning_modules.temperature import TemperatureScaledModule
from vidreason.lightning_modules.vlms.loading.adapters import (
    LoRAOptions,
    attach_lora,
    copy_adapter,
    load_adapter,
    save_adapter,
    use_adapter,
)
from vidreason.lightning_modules.vlms.loading.building import POLICY
from vidreason.run_folder import ADAPTER_FOLDER

CALIBRATOR = "calibrator"


class CalibratorModule(TemperatureScaledModule):
    """A policy and its calibrator on one base; a subclass has the arguments and the step.

    Its attributes are arguments of ``CalibrationModule``.
    """

    trained_adapter: ClassVar[str] = CALIBRATOR
    calibrator_path: str | None
    input: CalibratorInput
    loss_kind: str
    lora: LoRAOptions

    # ------------------------------------------------------------------ what it starts from

    def setup(self, stage: str) -> None:
        """Reads what the calibrator's folder says; then as every stage."""
        if stage == "fit":
            self.refuse_accumulation()
        if self.calibrator_path is not None:
            self.take_calibrator(Path(self.calibrator_path))
        elif stage in ("test", "validate"):
            raise ValueError(
                "calibration: give --model.init_args.calibrator_path, the adapter/ that a calibration stage wrote"
            )
        super().setup(stage)

    def take_calibrator(self, folder: Path) -> None:
        """Takes policy and temperature from the calibrator's folder.

        Raises:
            ValueError: It is no calibrator, or is of another policy, input or class list.
        """
        found = CalibratorInfo.read(folder, self.stage_name)
        found.check(folder, self.input, self.data.label_names, self.task.sha())
        if self.adapter_path is None and found.policy is not None:
            self.adapter_path = os.path.normpath(folder.resolve() / found.policy)
        if self.parent_sha != found.parent_sha:
            raise ValueError(
                f"calibrator_path: {folder} reviews the traces of another policy than {self.adapter_path}; "
                "leave adapter_path null to take its own"
            )
        if found.sampling != asdict(self.trace_options.sampling):
            rank_zero_warn(f"traces are sampled otherwise than those that {folder} was trained on: {found.sampling}")
        self.temperature = found.temperature

    def build_model(self) -> nn.Module:
        """Builds the policy and beside it the calibrator, which is active but where the policy samples."""
        model = super().build_model()
        if self.calibrator_path is not None:
            model = load_adapter(model, self.calibrator_path, CALIBRATOR)
        elif isinstance(model, PeftModel):
            copy_adapter(model, POLICY, CALIBRATOR, trainable=True)
        else:
            assert isinstance(model, PreTrainedModel)
            frozen = self.vlm.vision_modules if self.vlm.freeze_vision else ()
            model = attach_lora(model, self.lora, CALIBRATOR, frozen)
        assert isinstance(model, PeftModel)
        model.set_adapter(CALIBRATOR)  # trainable, and POLICY frozen
        return model

    @property
    def adapter_options(self) -> LoRAOptions:
        """The calibrator's."""
        return self.vlm.lora or self.lora

    @property
    def policy_adapter(self) -> str | None:
        """Name of the policy's adapter; None where its weights are the base in memory."""
        assert isinstance(self.policy, PeftModel)
        return POLICY if POLICY in self.policy.peft_config else None

    def sample_texts(self, batch: VideoBatch, options: TraceOptions) -> Sequence[Sequence[Completion]]:
        """Lets the policy, not the calibrator, write."""
        with use_adapter(self.policy, self.policy_adapter):
            return super().sample_texts(batch, options)

    # ------------------------------------------------------------------ what it hands on

    def lineage(self, folder: Path) -> Lineage:
        """As every stage, with what is needed to run the calibrator."""
        policy: str | None = None
        if self.adapter_path is not None:
            here = self.run_dir / ADAPTER_FOLDER
            inside = folder == here and not self.starts_from_weights
            policy = POLICY if inside else os.path.relpath(Path(self.adapter_path).resolve(), folder.resolve())
        extra = calibrator_extra(self.temperature, self.input, self.loss_kind, policy, self.trace_options)
        return replace(super().lineage(folder), extra=extra)

    def export(self, run_dir: Path) -> Path:
        """Writes the calibrator, and its policy beside it, as ``calibrator_info.py`` describes."""
        self.refresh_stale_temperature()
        folder = run_dir / ADAPTER_FOLDER
        copied = self.adapter_path is not None and not self.starts_from_weights
        beside = {POLICY: Path(str(self.adapter_path))} if copied else {}
        save_adapter(self.policy, folder, CALIBRATOR, self.lineage(folder).info(), beside)
        return folder
