"""Temperature scaling of a stage's class probabilities (Guo et al., arXiv 1706.04599).

The temperature is fitted on ``cal`` whenever the weights are validated or handed on, is kept with them, and is applied
to every decision; metrics are logged before and after it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_modules.base import VLMModule, metric_key
from vidreason.lightning_modules.deciding import update_metrics
from vidreason.lightning_modules.functional.calibration import fit_temperature
from vidreason.lightning_modules.metrics import ClassificationMetrics
from vidreason.lightning_modules.predictions import Decisions
from vidreason.lightning_modules.vlms.generation import evaluating
from vidreason.lightning_modules.work import Work


class TemperatureScaledModule(VLMModule):
    """A stage that decides by temperature-scaled class probabilities."""

    temperature: float = 1.0
    scaled_metrics: nn.ModuleDict
    _temperature_step: int = -1
    """Optimizer step of the weights that the temperature was fitted to"""

    # ------------------------------------------------------------------ fitting it

    def on_validation_epoch_start(self) -> None:
        """Fits the temperature of the weights as they are, before they are validated."""
        if self.fitting and not self.trainer.sanity_checking:
            self.refresh_temperature()

    def refresh_stale_temperature(self) -> None:
        """Fits the temperature if the weights have changed since; not in an interrupted fit, which has to end soon."""
        stale = self._temperature_step != self.trainer.global_step
        if stale and self.trainer.state.status != TrainerStatus.INTERRUPTED:
            self.refresh_temperature()

    def refresh_temperature(self) -> None:
        """Fits the temperature on ``cal``, which serves nothing else.

        Raises:
            ValueError: No clip of ``cal`` can be read and has a label.
        """
        if not self.data.clips("cal"):
            rank_zero_warn("calibration: there is no split cal, so the temperature stays 1")
            return
        logprobs, labels = [], []
        with torch.no_grad(), evaluating(self.policy), self.forward_context():
            for batch in self.data.loader("cal", self.eval_view()):
                labelled = batch.labels >= 0
                if bool(labelled.any()):
                    logprobs.append(self.class_logprobs(batch.to(self.device)).float().cpu()[labelled])
                    labels.append(batch.labels[labelled])
        if not labels:
            raise ValueError("calibration: no clip of split cal can be read and has a label, so no temperature fits")
        fit = fit_temperature(torch.cat(logprobs), torch.cat(labels))
        if fit.at_bound:
            rank_zero_warn(
                f"calibration: the temperature fitted on {len(torch.cat(labels))} clips of cal is at its bound, "
                f"{fit.temperature:.2f}: too few clips, or probabilities that say nothing"
            )
        self.temperature, self._temperature_step = fit.temperature, self.trainer.global_step

    def watching_work(self, clips: float, data: VideoDataModule) -> Work:
        """The temperature is fitted on ``cal`` first, by every rank."""
        return self.deciding_work(clips + len(data.clips("cal")), len(data.label_names))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As every stage, with the temperature."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["temperature"] = self.temperature

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As every stage, with the temperature."""
        super().on_load_checkpoint(checkpoint)
        self.temperature = checkpoint["temperature"]

    # ------------------------------------------------------------------ metrics before and after it

    def setup(self, stage: str) -> None:
        """As every stage, with a second set of metrics."""
        super().setup(stage)
        self.scaled_metrics = nn.ModuleDict({key: self.new_metrics() for key in self.metrics})

    def count(self, batch: VideoBatch, decisions: Decisions | None, split: str) -> None:
        """Counts probabilities before and after scaling; clips that could not be read are in both."""
        names = self.data.label_names
        update_metrics(self.scaled_of(split), batch, decisions, names, self.device)
        if decisions is not None and decisions.unscaled is not None:
            decisions = replace(decisions, probs=decisions.unscaled)
        super().count(batch, decisions, split)

    def scaled_of(self, split: str) -> ClassificationMetrics:
        """Returns the metrics of the temperature-scaled probabilities of a split."""
        metrics = self.scaled_metrics[metric_key(split)]
        assert isinstance(metrics, ClassificationMetrics)
        return metrics

    def log_metrics(self, split: str) -> None:
        """Logs ``<split>/*`` before scaling, ``temperature``, and ``ece_scaled``, ``nll_scaled``, ``brier_scaled``."""
        super().log_metrics(split)
        scaled = self.scaled_of(split)
        if int(scaled.confusion().sum()):
            values = scaled.compute()
            self.log_dict({f"{split}/{name}_scaled": values[name] for name in ("ece", "nll", "brier")})
            self.log(f"{split}/temperature", self.temperature)
        scaled.reset()
