"""Decides about the batches of a split and updates its metrics, before and after temperature scaling.

Shape letters: B readable clips of a batch, F unreadable clips, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vidreason.datamodules.types import VideoBatch
from vidreason.datamodules.unreadable import warn_unreadable
from vidreason.lightning_modules.decisions.deciders import Decider, decide_in_pieces
from vidreason.lightning_modules.decisions.metrics import UNDECIDED, ClassificationMetrics
from vidreason.lightning_modules.decisions.predictions import BatchDecisions, Prediction, failed_prediction
from vidreason.lightning_modules.vlms.base import VLM

_SCALED = ("ece", "nll", "brier")
"""Metrics of probabilities, which temperature scaling changes; they are also logged as ``<name>_scaled``."""


class SplitMetrics(nn.Module):
    """Metrics of one split, for unscaled and for temperature-scaled probabilities.

    Args:
        label_names: The C class names.
        scaled: Whether decisions have probabilities from before and after temperature scaling.
        probabilities: Whether decisions have probabilities; without, there is no ECE, NLL and Brier score.
    """

    def __init__(self, label_names: Sequence[str], scaled: bool = False, probabilities: bool = True) -> None:
        super().__init__()
        self.probabilities = probabilities
        self.label_names = tuple(label_names)
        self.plain = ClassificationMetrics(label_names)
        self.scaled = ClassificationMetrics(label_names) if scaled else None

    def update(self, batch: VideoBatch, decisions: BatchDecisions | None) -> None:
        """Adds the labelled clips of a batch; an unreadable clip is undecided and counts as wrong.

        Args:
            batch: B readable and F unreadable clips.
            decisions: Decisions about the readable clips; None if there are none.
        """
        lost = [self.label_names.index(f.clip.label) for f in batch.failed if f.clip.label is not None]
        labels = torch.tensor(lost, dtype=torch.int64)
        pred = torch.full((len(lost),), UNDECIDED)
        # Uniform probabilities keep the NLL of an unreadable clip finite.
        probs = scaled = torch.full((len(lost), len(self.label_names)), 1 / len(self.label_names))
        if decisions is not None:
            labelled = batch.labels.cpu() >= 0
            labels = torch.cat([batch.labels.cpu()[labelled], labels])
            pred = torch.cat([decisions.pred[labelled], pred])
            unscaled = decisions.probs if decisions.unscaled is None else decisions.unscaled
            probs = torch.cat([unscaled[labelled], probs])
            scaled = torch.cat([decisions.probs[labelled], scaled])
        device = batch.labels.device
        self.plain.update(probs.to(device), labels.to(device), pred.to(device))
        if self.scaled is not None:
            self.scaled.update(scaled.to(device), labels.to(device), pred.to(device))

    def clips(self) -> int:
        """Returns the number of clips that were added on all ranks; every rank has to call it."""
        return int(self.plain.confusion().sum())

    def compute(self, split: str) -> dict[str, Tensor]:
        """Returns the metrics of all ranks as ``<split>/<name>`` and resets them; {} if no clip was added."""
        if not self.clips():
            return {}
        values = self.plain.compute()
        self.plain.reset()
        if not self.probabilities:
            values = {name: value for name, value in values.items() if name not in _SCALED}
        if self.scaled is not None:
            after = self.scaled.compute()
            values |= {f"{name}_scaled": after[name] for name in _SCALED}
            self.scaled.reset()
        return {f"{split}/{name}": value for name, value in values.items()}


def evaluate_batch(
    decider: Decider,
    vlm: VLM,
    model: nn.Module,
    batch: VideoBatch,
    split: str,
    metrics: SplitMetrics,
    clips_per_forward: int | None = None,
) -> tuple[Prediction, ...]:
    """Decides about a batch and updates the metrics of its split; clips that could not be read count as wrong.

    Args:
        decider: Decides about the readable clips.
        vlm: The model family.
        model: The model.
        batch: B readable and F unreadable clips.
        split: Name of the split.
        metrics: Metrics of the split, which are updated.
        clips_per_forward: Clips that go through the model at once; None is the whole batch.

    Returns:
        A prediction for every clip of the batch, unreadable ones first.
    """
    if len(batch) and not bool(batch.sample_mask.any()):
        return ()  # This rank had no clip left and got one only to run as many batches as the others.
    warn_unreadable(batch, f"counted wrong in {split}")
    names = metrics.label_names
    decisions = decide_in_pieces(decider, vlm, model, batch, clips_per_forward) if len(batch) else None
    metrics.update(batch, decisions)
    predictions = [failed_prediction(failed, split, names) for failed in batch.failed]
    if decisions is not None:
        predictions += [decisions.prediction(b, clip, split, names) for b, clip in enumerate(batch.clips)]
    return tuple(predictions)


def metric_key(split: str) -> str:
    """Returns the name of the submodule of a split's metrics, which may not contain a dot."""
    return split.replace(".", "_")
