"""Temperature scaling of class probabilities (Guo et al., arXiv 1706.04599), fitted on split ``cal``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_modules.decisions.deciders import score_classes
from vidreason.lightning_modules.functional.calibration import fit_temperature
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.generation import evaluating
from vidreason.lightning_modules.vlms.pieces import split_clips


@dataclass
class TemperatureScaling:
    """A temperature with the optimizer step of the weights that it was fitted to; checkpoints store both."""

    temperature: float = 1.0
    fitted_at: int = -1
    """Optimizer step; -1 if the temperature was not fitted in this run."""

    @torch.no_grad()
    def fit(
        self,
        vlm: VLM,
        model: nn.Module,
        batches: Iterable[VideoBatch],
        label_names: tuple[str, ...],
        step: int,
        clips_per_forward: int | None = None,
    ) -> None:
        """Fits the temperature to the current weights.

        Args:
            vlm: The model family.
            model: The model; it runs in eval mode, and its modes are restored.
            batches: Clips of split ``cal``, encoded for closed-set scoring.
            label_names: The class names.
            step: Optimizer step of the weights.
            clips_per_forward: Clips that go through the model at once; None is a whole batch.

        Raises:
            ValueError: If no readable clip has a label.
        """
        logprobs, labels = [], []
        device = next(model.parameters()).device
        with evaluating(model):
            for batch in batches:
                labelled = batch.labels >= 0
                if bool(labelled.any()):
                    parts = split_clips(vlm, batch.to(device), clips_per_forward)
                    scores = torch.cat([score_classes(vlm, model, part, label_names) for part in parts])
                    logprobs.append(scores.float().cpu()[labelled])
                    labels.append(batch.labels[labelled])
        if not labels:
            raise ValueError("calibration: no clip of split cal can be read and has a label, so no temperature fits")
        found = fit_temperature(torch.cat(logprobs), torch.cat(labels))
        if found.at_bound:
            rank_zero_warn(
                f"calibration: the temperature fitted on {len(torch.cat(labels))} clips of cal is at its bound, "
                f"{found.temperature:.2f}: too few clips, or probabilities that carry no information"
            )
        self.temperature, self.fitted_at = found.temperature, step

    def state_dict(self) -> dict[str, Any]:
        """Returns the temperature and its optimizer step."""
        return {"temperature": self.temperature, "fitted_at": self.fitted_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the temperature of a checkpoint."""
        self.temperature, self.fitted_at = state_dict["temperature"], state_dict["fitted_at"]
