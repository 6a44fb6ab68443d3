"""The passes of a stage through the model: which clips, how many at once, and which texts follow each prompt.

``vidreason plan`` derives steps and memory from it, and a fit checks the length of its prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from vidreason.datamodules.base import VideoDataModule
from vidreason.datamodules.prompts import ClipView
from vidreason.datamodules.task import Task
from vidreason.datamodules.types import Clip
from vidreason.lightning_modules.decisions.deciders import DecideOptions, Decider
from vidreason.lightning_modules.fit.optimizer_step import UpdateOptions
from vidreason.lightning_modules.traces.generation import TraceOptions, trace_view
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.pieces import EvalOptions
from vidreason.rewards.completion import CompletionForm

CLIPS_PER_FORWARD = "model.init_args.updates.clips_per_forward"
EVAL_CLIPS = "model.init_args.eval.clips_per_forward"


@dataclass(frozen=True)
class Pass:
    """One kind of pass over the clips of some splits."""

    name: str
    """``training``, ``rollouts``, ``writing``, ``validation``, …"""
    kind: Literal["update", "score", "generate"]
    """``update`` runs forward and backward, ``score`` forward only, ``generate`` samples completions."""
    splits: tuple[str, ...]
    view: ClipView
    """The prompt, and the texts behind it."""
    bound: str
    """The setting that bounds the clips of one forward pass."""
    clips_per_forward: int
    samples: int = 1
    """Completions per clip, for ``generate``."""
    sampling: Sampling = Sampling()
    """Options of the completions, for ``generate``."""
    stand_ins: bool = False
    """True if the texts of ``view`` are placeholders of maximal length, because the real texts do not exist yet."""
    per_step: bool = False
    """True if the pass is part of every optimizer step; False if it runs once, or once in every validation."""

    def clips(self, data: VideoDataModule) -> list[Clip]:
        """Returns the clips that go through the pass; those without a target are left out of optimizer steps."""
        clips = [clip for split in self.splits for clip in data.clips(split)]
        return [clip for clip in clips if not self.per_step or self.view.keep(clip)]


@dataclass(frozen=True)
class Workload:
    """The passes of a command in their order."""

    passes: tuple[Pass, ...]
    frozen_copies: int = 0
    """Number of copies of the trained weights that are held without being trained."""


class WorkingStage(Protocol):
    """The options of a stage that its passes follow from."""

    vlm: VLM
    batch_size: int | None
    decide: DecideOptions
    traces: TraceOptions
    completion: CompletionForm

    @property
    def updates(self) -> UpdateOptions:
        """Options of an optimizer step."""

    @property
    def evaluation(self) -> EvalOptions:
        """Options of forwards without a backward pass."""

    def train_view(self, task: Task) -> ClipView:
        """Returns the prompts and target texts of training."""

    def decider(self, task: Task) -> Decider:
        """Returns the object that decides about clips."""


def plain_workload(
    stage: WorkingStage, data: VideoDataModule, command: str, training: Sequence[Pass] | None = None
) -> Workload:
    """Returns the workload of a stage that decides about clips by ``decide``.

    Args:
        stage: The stage.
        data: The data module.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        training: The passes of a fit except validation; None is one optimizer step after another on ``train_view``.
    """
    if command == "predict":
        return Workload((writing_pass(stage, data, stage.traces.kind, data.predict_splits),))
    if command != "fit":
        splits = data.test_split_names if command == "test" else ("val",)
        return Workload((deciding_pass(stage, data, splits, "deciding"),))
    steps = [update_pass(stage, data, stage.train_view(data.task))] if training is None else training
    validation = [deciding_pass(stage, data, ("val",), "validation")] if data.clips("val") else []
    return Workload((*steps, *validation))


def update_pass(stage: WorkingStage, data: VideoDataModule, view: ClipView, stand_ins: bool = False) -> Pass:
    """Returns the pass of the optimizer steps."""
    batch = stage.batch_size or data.batch_size
    clips = min(stage.updates.clips_per_forward or batch, batch)
    return Pass("training", "update", ("train",), view, CLIPS_PER_FORWARD, clips, stand_ins=stand_ins, per_step=True)


def eval_clips(stage: WorkingStage, data: VideoDataModule) -> int:
    """Returns the clips of one forward without a backward pass."""
    return min(stage.evaluation.clips_per_forward or data.eval_batch_size, data.eval_batch_size)


def writing_pass(
    stage: WorkingStage, data: VideoDataModule, kind: Literal["describe", "reason"], splits: Sequence[str]
) -> Pass:
    """Returns the pass in which texts of a kind are generated."""
    options, view = stage.traces, trace_view(data.task, kind, stage.traces.label_hint, stage.completion)
    clips = eval_clips(stage, data)
    return Pass("writing", "generate", tuple(splits), view, EVAL_CLIPS, clips, options.samples, options.sampling)


def deciding_pass(stage: WorkingStage, data: VideoDataModule, splits: Sequence[str], name: str) -> Pass:
    """Returns the pass that decides about clips."""
    options, view = stage.decide, stage.decider(data.task).view
    made = Pass(name, "score", tuple(splits), view, EVAL_CLIPS, eval_clips(stage, data))
    if options.by == "likelihood":
        return made
    return replace(made, kind="generate", samples=options.samples, sampling=options.sampling)


def stand_in_texts(tokenizer: Any, clips: Iterable[Clip], tokens: int, samples: int) -> dict[str, tuple[str, ...]]:
    """Returns ``samples`` texts of about ``tokens`` tokens for each clip by video id, for texts yet to be written."""
    probe = 64
    each = len(tokenizer(" the" * probe, add_special_tokens=False)["input_ids"]) / probe
    texts = ((" the" * max(1, round(tokens / each))).strip(),) * samples
    return {clip.video_id: texts for clip in clips}
