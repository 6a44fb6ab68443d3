"""Decides about clips with a loaded model: the same prompts, sampling and code as in ``vidreason test``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidreason.answering.loaded import LoadedModel
from vidreason.config.quiet import quietly
from vidreason.datamodules.inference_data import INFERENCE_SPLIT, InferenceDataModule, ReadClip
from vidreason.datamodules.prompts import ClipView
from vidreason.datamodules.traces import TraceRecord
from vidreason.datamodules.types import Clip, VideoBatch
from vidreason.lightning_modules.decisions.deciders import ReviewDecider, decide_in_pieces
from vidreason.lightning_modules.decisions.predictions import BatchDecisions
from vidreason.lightning_modules.traces.generation import TraceGenerator
from vidreason.lightning_modules.vlms.text.context import prompt_tokens
from vidreason.lightning_modules.weights.answering import Answering


@dataclass(frozen=True)
class DecidedClip:
    """One clip's row among the decisions of its batch."""

    decisions: BatchDecisions
    row: int
    input_tokens: int
    """Tokens of prompts and texts that went through the model for it, each prompt once; sampled ones do not count."""

    @property
    def unscaled(self) -> Tensor:
        """[C] class probabilities before temperature scaling, of which thresholds are."""
        found = self.decisions.probs if self.decisions.unscaled is None else self.decisions.unscaled
        return found[self.row]


class ClipDecider:
    """Decides about batches of clips with a loaded model.

    Args:
        loaded: The model.
        batch_size: Number of clips per batch.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int) -> None:
        self._answering, self._task, self._fabric = loaded.answering, loaded.task, loaded.fabric
        self.data = InferenceDataModule(loaded.task, loaded.answering.vlm, loaded.frames, loaded.seed, batch_size)
        """Reads clips, as ``decide`` takes them."""

    def decide(self, clips: Sequence[ReadClip], samples: int | None = None) -> list[DecidedClip | str]:
        """Decides about clips.

        Args:
            clips: The clips; the noise of a clip's traces depends on its id and not on the other clips. A clip that is
                given twice is decided once.
            samples: Traces or sampled answers per clip (K); None uses the number of the run.

        Returns:
            The decision about each clip, or why it could not be read.
        """
        found: list[DecidedClip | str] = [""] * len(clips)
        for group in _without_same_ids(clips):
            self.data.set_clips(clips[number] for number in group)
            with torch.inference_mode(), self._fabric.autocast(), quietly():
                decided = self._decide_all(self._answering.with_samples(samples))
            for number in group:
                found[number] = decided[clips[number].clip.video_id]
        return found

    def batches(self, clips: Sequence[ReadClip], view: ClipView) -> Iterator[VideoBatch]:
        """Yields other questions about clips with different ids, encoded by a view, on the model's device."""
        self.data.set_clips(clips)
        for batch in self.data.loader(INFERENCE_SPLIT, view):
            yield batch.to(self._fabric.device)

    def _decide_all(self, answering: Answering) -> dict[str, DecidedClip | str]:
        decider, read = answering.decider, dict[str, int]()
        if isinstance(decider, ReviewDecider) and answering.generator is not None:
            traces, read = self._traces(answering, answering.generator)
            decider = replace(decider, traces=traces)
        found: dict[str, DecidedClip | str] = {}
        batches: Iterator[VideoBatch] = iter(self.data.loader(INFERENCE_SPLIT, decider.view))
        for batch in batches:
            found |= {failed.clip.video_id: failed.error for failed in batch.failed}
            if len(batch):
                batch, size = batch.to(self._fabric.device), answering.clips_per_forward
                decisions = decide_in_pieces(decider, answering.vlm, answering.model, batch, size)
                for row, (name, tokens) in enumerate(input_tokens(batch).items()):
                    found[name] = DecidedClip(decisions, row, tokens + read.get(name, 0))
        return found

    def _traces(
        self, answering: Answering, generator: TraceGenerator
    ) -> tuple[dict[str, list[TraceRecord]], dict[str, int]]:
        """Returns newly generated traces of the current clips, and the tokens of their prompts, by video id."""
        traces: dict[str, list[TraceRecord]] = {}
        read: dict[str, int] = {}
        for batch in self.data.loader(INFERENCE_SPLIT, generator.view):
            for record in generator.records(answering.writer, batch.to(self._fabric.device), self._task.label_names):
                traces.setdefault(record.video_id, []).append(record)
            read |= input_tokens(batch) if len(batch) else {}
        return traces, read


def _without_same_ids(clips: Sequence[ReadClip]) -> list[list[int]]:
    """Returns groups of clips, by number, in which an id stands for one clip: two files may have the same name."""
    groups = list[tuple[dict[str, Clip], list[int]]]()
    for number, read in enumerate(clips):
        clip = read.clip
        fitting = (group for group in groups if group[0].get(clip.video_id, clip) == clip)
        group = next(fitting, None)
        if group is None:
            group = ({}, [])
            groups.append(group)
        group[0][clip.video_id] = clip
        group[1].append(number)
    return [numbers for _, numbers in groups]


def input_tokens(batch: VideoBatch) -> dict[str, int]:
    """Returns the tokens of each clip's prompt and of all texts behind it, by video id."""
    behind = torch.zeros(len(batch), dtype=torch.int64, device=batch.texts.owner.device)
    behind = behind.index_add(0, batch.texts.owner, batch.texts.mask.sum(dim=1))
    total = prompt_tokens(batch.prompts) + behind
    return dict(zip(batch.video_ids, total.tolist(), strict=True))
