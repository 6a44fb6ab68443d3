"""A linear probe: logistic regression on what the vision path of the untrained base makes of a clip.

It is a baseline: a decoder that reasons has to beat a straight line through the same embeddings. Nothing is kept; a
test embeds the clips of train and val, fits the probe in float64, and decides.

Shape letters: B clips, N clips of a split, C classes, H hidden size, F = 4 H features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from vidreason.datamodules.prompts import ClipView, LabelScoringView
from vidreason.datamodules.task import Task
from vidreason.datamodules.types import EncodedPrompts, VideoBatch
from vidreason.lightning_modules.base import VLMModule
from vidreason.lightning_modules.decisions.deciders import decide_by_probs
from vidreason.lightning_modules.decisions.predictions import BatchDecisions
from vidreason.lightning_modules.functional.calibration import nll
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.encoder import placeholder_tokens
from vidreason.lightning_modules.vlms.generation import evaluating
from vidreason.lightning_modules.vlms.prefix.layout import unwrap

PARTS = 4
"""Stretches of a clip whose visual tokens are averaged by themselves, so that a class may depend on the order."""


class _EmbeddedError(Exception):
    """Carries the input embeddings out of a forward, whose decoder need not run."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.embeddings = embeddings


@dataclass(frozen=True)
class Probe:
    """A fitted logistic regression on standardised features."""

    mean: Tensor
    """[F]"""
    scale: Tensor
    """[F]"""
    weight: Tensor
    """[C, F + 1], the constant last."""
    penalty: float

    def __call__(self, features: Tensor) -> Tensor:
        """Returns the probabilities [N, C] of features [N, F]."""
        return _logits(self.weight, (features.double() - self.mean) / self.scale).softmax(-1)


@dataclass(frozen=True)
class ProbeDecider:
    """Decides by a probe; None before it is fitted, when only the view is needed."""

    task: Task
    probe: Probe | None

    @property
    def view(self) -> ClipView:
        """The label prompt, of which only the visual tokens are used."""
        return LabelScoringView(self.task)

    def decide(self, vlm: VLM, model: nn.Module, batch: VideoBatch) -> BatchDecisions:
        """Decides by the probabilities of the probe."""
        assert self.probe is not None, "the probe is fitted when the test starts"
        return decide_by_probs(self.probe(clip_features(vlm, model, batch.prompts)), self.task.label_names)


class LinearProbeModule(VLMModule):
    """Tests a linear probe of the base's vision path.

    Args:
        vlm: The model family and checkpoint (the top-level ``vlm`` section).
        penalties: Candidates for the weight of the squared norm per clip, of which the least NLL on val chooses.
    """

    stage: ClassVar[str] = "linear_probe"

    def __init__(self, vlm: VLM, penalties: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0), **kwargs: Any) -> None:
        super().__init__(vlm, **kwargs)
        self.penalties = tuple(penalties)
        self.probe: Probe | None = None

    def decider(self, task: Task) -> ProbeDecider:
        """Returns the decider of the probe."""
        return ProbeDecider(task, self.probe)

    def on_test_start(self) -> None:
        """Fits the probe.

        Raises:
            ValueError: If no clip of train can be read and has a label.
        """
        train, val = self._embedded("train"), self._embedded("val")
        if train is None:
            raise ValueError("linear_probe: no clip of split train can be read and has a label")
        self.probe = fit_probe(*train, val, len(self.data.label_names), self.penalties)
        rank_zero_info(f"linear_probe: fitted on {len(train[1])} clips, penalty {self.probe.penalty:g}")

    @torch.no_grad()
    def _embedded(self, split: str) -> tuple[Tensor, Tensor] | None:
        """Returns (features [N, F], labels [N]) of the readable labelled clips of a split; None without any."""
        if not self.data.clips(split):
            return None
        features, labels = [], []
        with self.trainer.precision_plugin.forward_context(), evaluating(self.policy):
            for batch in self.data.loader(split, self.decider(self.data.task).view):
                known = batch.labels >= 0
                if bool(known.any()):
                    moved = batch.prompts.to(self.device)
                    features.append(clip_features(self.vlm, self.policy, moved)[known])
                    labels.append(batch.labels[known])
        return (torch.cat(features), torch.cat(labels)) if labels else None


def clip_features(vlm: VLM, model: nn.Module, prompts: EncodedPrompts) -> Tensor:
    """Returns the features [B, F] of the videos of B prompts: the mean visual token of each quarter of a clip."""
    base = unwrap(model)
    handle = base.get_decoder().register_forward_pre_hook(_leave_with_embeddings, with_kwargs=True)
    try:
        with vlm.fed_from_cache(model, prompts) as fed:
            base(**fed.inputs)
        raise AssertionError("the decoder of the model was not called")
    except _EmbeddedError as found:
        embeddings = found.embeddings.detach().double().cpu()
    finally:
        handle.remove()
    ids = torch.tensor(sorted(placeholder_tokens(base.config)))
    visual = torch.isin(prompts.inputs["input_ids"].cpu(), ids)
    rows = [embeddings[b][visual[b]].tensor_split(PARTS) for b in range(len(embeddings))]
    return torch.stack([torch.cat([part.mean(0) for part in parts]) for parts in rows])


def fit_probe(
    features: Tensor, labels: Tensor, val: tuple[Tensor, Tensor] | None, classes: int, penalties: Sequence[float]
) -> Probe:
    """Fits logistic regressions by L-BFGS and takes the one of the least NLL on val; without val the middle penalty.

    Args:
        features: [N, F] of train.
        labels: [N] int64.
        val: Features and labels of val.
        classes: C.
        penalties: Weights of the squared norm, at least one.
    """
    mean, scale = features.mean(0), features.std(0).clamp(min=1e-6)
    inputs = (features - mean) / scale
    probes = [Probe(mean, scale, _fitted(inputs, labels, classes, penalty), penalty) for penalty in penalties]
    if val is None:
        return probes[len(probes) // 2]
    return min(probes, key=lambda probe: float(nll(probe(val[0]), val[1]).mean()))


def _fitted(inputs: Tensor, labels: Tensor, classes: int, penalty: float) -> Tensor:
    """Returns the weights [C, F + 1] that minimise mean NLL + penalty x squared norm without the constants."""
    with torch.inference_mode(False), torch.enable_grad():
        inputs, labels = inputs.clone(), labels.clone()  # a test runs in inference mode, whose tensors have no gradient
        weight = torch.zeros(classes, inputs.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight], max_iter=1000, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=1e-14
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(_logits(weight, inputs), labels)
            loss = loss + penalty * weight[:, :-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return weight.detach()


def _logits(weight: Tensor, inputs: Tensor) -> Tensor:
    return inputs @ weight[:, :-1].T + weight[:, -1]


def _leave_with_embeddings(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _EmbeddedError(kwargs["inputs_embeds"])
