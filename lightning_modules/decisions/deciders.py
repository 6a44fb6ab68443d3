"""Deciders: decisions about clips by class likelihoods, by generated answers, or by a reviewer of traces.

A decider defines the prompt (``view``) and decides about the readable clips of a batch. It holds neither weights nor a
trainer, so that evaluation under a trainer and ``VideoClassifier`` run the same code.

Shape letters: B clips, C classes, K samples per clip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vidreason.datamodules.prompts import ClipView, LabelScoringView, ReasonView, ReviewInput, ReviewView
from vidreason.datamodules.task import Task
from vidreason.datamodules.traces import TraceRecord
from vidreason.datamodules.types import VideoBatch
from vidreason.lightning_modules.decisions.closed_set import class_logprobs
from vidreason.lightning_modules.decisions.predictions import BatchDecisions, Trace
from vidreason.lightning_modules.functional.calibration import apply_temperature
from vidreason.lightning_modules.functional.finite import check_rows
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.completions import Completion, generate_completions
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.pieces import split_clips
from vidreason.rewards.completion import CompletionForm, match_label

VOTE_SMOOTHING = 0.01
"""Pseudo-count of every class in the probabilities of generated answers, which keeps their NLL finite."""


@dataclass(frozen=True)
class DecideOptions:
    """Options of decisions about clips.

    Args:
        by: ``likelihood`` compares the sequence log-likelihoods of all class names behind one prefill; ``answer``
            samples completions and takes the majority of their answers (a clip without any counts as wrong).
        samples: Completions per clip for ``answer``.
        sampling: Sampling options for ``answer``; temperature 0 is greedy.
    """

    by: Literal["likelihood", "answer"] = "likelihood"
    samples: int = 1
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.0))

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"decide.samples must be at least 1, got {self.samples}")


class Decider(Protocol):
    """The interface of a decider."""

    @property
    def view(self) -> ClipView:
        """The prompt and texts that a clip is encoded with."""
        ...

    def decide(self, vlm: VLM, model: nn.Module, batch: VideoBatch) -> BatchDecisions:
        """Decides about the B readable clips of a batch, which were encoded with ``view``."""
        ...


@dataclass(frozen=True)
class LikelihoodDecider:
    """Chooses the class whose name is the likeliest answer."""

    task: Task

    @property
    def view(self) -> ClipView:
        """The label prompt with every class name behind it."""
        return LabelScoringView(self.task)

    def decide(self, vlm: VLM, model: nn.Module, batch: VideoBatch) -> BatchDecisions:
        """Decides by the softmax over the sequence log-likelihoods of the class names."""
        return decide_by_probs(score_classes(vlm, model, batch, self.task.label_names).exp(), self.task.label_names)


@dataclass(frozen=True)
class AnswerDecider:
    """Chooses the most frequent answer of K generated completions."""

    task: Task
    samples: int
    sampling: Sampling
    seed: int
    form: CompletionForm

    @property
    def gives_probabilities(self) -> bool:
        """False for a single answer or greedy ones: how often the model would give them is not known."""
        return self.samples > 1 and self.sampling.temperature > 0

    @property
    def view(self) -> ClipView:
        """The reasoning prompt."""
        return ReasonView(self.task, form=self.form)

    def decide(self, vlm: VLM, model: nn.Module, batch: VideoBatch) -> BatchDecisions:
        """Samples the completions and counts their answers."""
        sampled = generate_completions(
            vlm, model, batch.prompts, batch.clips, self.samples, self.sampling, self.seed, form=self.form
        )
        return decide_by_answers(sampled.completions, self.task.label_names, self.gives_probabilities)


@dataclass(frozen=True)
class ReviewDecider:
    """Averages the class probabilities of a reviewer over K traces of each clip and scales them by a temperature."""

    task: Task
    input: ReviewInput
    temperature: float
    traces: Mapping[str, Sequence[TraceRecord]] = field(default_factory=dict)
    """The policy's traces by video id."""

    @property
    def view(self) -> ClipView:
        """The reviewer's prompt with every trace, and every class name behind each trace."""
        return self.review("all")

    def review(self, labels: Literal["all", "target"]) -> ReviewView:
        """Returns the reviewer's prompt with every class name behind each trace, or with the clip's own label."""
        texts = {video_id: tuple(r.text for r in group) for video_id, group in self.traces.items()}
        return ReviewView(self.task, texts, labels, self.input)

    def decide(self, vlm: VLM, model: nn.Module, batch: VideoBatch) -> BatchDecisions:
        """Decides by the averaged and temperature-scaled class probabilities."""
        logprobs = score_classes(vlm, model, batch, self.task.label_names)
        traces = [
            tuple(Trace(record.text, record.answer, record.n_tokens) for record in self.traces.get(clip.video_id, ()))
            for clip in batch.clips
        ]
        probs = apply_temperature(logprobs, self.temperature)
        return decide_by_probs(probs, self.task.label_names, traces, unscaled=logprobs.exp())


def decide_in_pieces(
    decider: Decider, vlm: VLM, model: nn.Module, batch: VideoBatch, clips_per_forward: int | None
) -> BatchDecisions:
    """Decides about the B readable clips of a batch, at most ``clips_per_forward`` of them in one forward."""
    parts = split_clips(vlm, batch, clips_per_forward)
    return BatchDecisions.joined([decider.decide(vlm, model, part) for part in parts])


def score_classes(vlm: VLM, model: nn.Module, batch: VideoBatch, label_names: Sequence[str]) -> Tensor:
    """Returns the logarithms of the class probabilities [B, C] of the readable clips of a batch."""
    scores = vlm.score(model, batch.prompts, batch.texts)
    found = class_logprobs(scores.logprobs, batch.texts, len(label_names), len(batch))
    check_rows(found, batch.video_ids, "the class log-probabilities are")
    return found


def decide_by_probs(
    probs: Tensor,
    label_names: Sequence[str],
    traces: Sequence[tuple[Trace, ...]] = (),
    unscaled: Tensor | None = None,
) -> BatchDecisions:
    """Chooses the likeliest class of every clip.

    Args:
        probs: [B, C].
        label_names: C class names.
        traces: [B][K] traces that the probabilities are based on, or empty.
        unscaled: [B, C] probabilities before temperature scaling, or None.
    """
    chosen = probs.argmax(dim=1)
    return BatchDecisions(
        probs=probs.float().cpu(),
        pred=chosen.cpu(),
        answers=tuple(label_names[i] for i in chosen.tolist()),
        traces=tuple(traces) or ((),) * len(probs),
        unscaled=None if unscaled is None else unscaled.float().cpu(),
    )


def decide_by_answers(
    groups: Sequence[Sequence[Completion]], label_names: Sequence[str], has_probs: bool
) -> BatchDecisions:
    """Chooses the most frequent of the K sampled answers of every clip.

    Args:
        groups: [B][K] completions.
        label_names: C class names.
        has_probs: Whether the shares of the answers are probabilities.
    """
    votes = [vote([match_label(c.parsed.answer, label_names) for c in group], label_names) for group in groups]
    return BatchDecisions(
        probs=torch.stack([v.probs for v in votes]),
        pred=torch.tensor([v.chosen for v in votes]),
        answers=tuple(group[0].parsed.answer for group in groups),
        traces=tuple(tuple(Trace(c.text, c.parsed.answer, c.n_tokens) for c in group) for group in groups),
        has_probs=has_probs,
    )


class Vote(NamedTuple):
    """The vote of one clip's samples."""

    probs: Tensor
    """[C] fp32"""
    chosen: int
    """Index of the class; -1 if no sample named a class."""


def vote(answers: Sequence[str | None], label_names: Sequence[str]) -> Vote:
    """Turns the answers of one clip's samples into class probabilities and a choice.

    An answer that names no class is spread evenly over all classes; a tie goes to the class that was named first.

    Args:
        answers: The class that each of K >= 1 samples named, or None.
        label_names: C class names.

    Example:
        >>> vote(["b", None, "b"], ["a", "b"]).chosen
        1
        >>> vote([None], ["a", "b"]).probs.tolist()
        [0.5, 0.5]
    """
    classes = len(label_names)
    named = [label_names.index(answer) for answer in answers if answer is not None]
    counts = torch.full((classes,), (len(answers) - len(named)) / classes + VOTE_SMOOTHING)
    counts += torch.bincount(torch.tensor(named, dtype=torch.int64), minlength=classes)
    # max returns the first of equal values, so that a tie goes to the class that was named first.
    return Vote(counts / counts.sum(), max(named, key=named.count) if named else -1)
