"""The model of the service: answers the questions of several requests about their clips together.

Only one thread may call it. A request's answer does not depend on the requests that it is answered with: the noise of
traces goes by the content of the clip.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from vidreason.answering.deciding import ClipDecider, DecidedClip, input_tokens
from vidreason.answering.loaded import LoadedModel
from vidreason.config.quiet import quietly
from vidreason.datamodules.clips.decoded import DecodedVideo
from vidreason.datamodules.task import Task
from vidreason.datamodules.types import Clip
from vidreason.lightning_modules.decisions.deciders import AnswerDecider, ReviewDecider
from vidreason.lightning_modules.decisions.predictions import Trace
from vidreason.lightning_modules.decisions.threshold import Threshold
from vidreason.lightning_modules.vlms.pieces import split_clips
from vidreason.lightning_modules.vlms.text.context import REMEDY
from vidreason.lightning_modules.vlms.vision_cache.cache import VisionCacheOptions
from vidreason.serving.open_questions import Asked, OpenQuestionsView, Probabilities, answer_open_questions

_VISION_GB = 0.5  # a clip is used twice within a request, and hardly ever again
_TEXT_GB = 2.0  # of the answers of one forward


@dataclass(frozen=True)
class Job:
    """One clip and what is asked about it."""

    clip: Clip
    """The clip; its id is derived from its content, so that two uploads of one file have the same noise."""
    video: DecodedVideo
    own: bool
    """True if the request asks the question that the run was trained on."""
    others: Asked
    samples: int | None = None
    """Traces for the question of the run; None is the number of the run."""


@dataclass(frozen=True)
class OwnAnswer:
    """The answer to the question that the run was trained on."""

    probs: Mapping[str, float]
    """Probability of every class; of sampled answers their shares, smoothed."""
    chosen: str | None
    """Name of the chosen class; None if no sampled answer could be parsed."""
    reason: str | None
    """The reason why there is no decision: ``below_threshold`` or ``no_answer``; None if there is one."""
    threshold: Threshold | None
    """The threshold that was applied; None if the run has none, or none for this number of traces."""
    traces: tuple[Trace, ...]


@dataclass(frozen=True)
class Answer:
    """The answers about one clip."""

    own: OwnAnswer | None
    others: tuple[Probabilities, ...]
    input_tokens: int
    output_tokens: int
    together: int
    """Number of requests that went through the model together."""
    seconds: float
    """Wall time in seconds of all requests that went through the model together."""


@dataclass(frozen=True)
class Refused:
    """A job without an answer."""

    why: str
    by_request: bool
    """True if the words of the request are the reason, so that the client can change them."""


class Engine:
    """A loaded model that answers jobs.

    Args:
        loaded: The model.
        batch_size: Clips that go through the model together.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int) -> None:
        self.task: Task = loaded.task
        self.threshold, self.answers = loaded.threshold, loaded.answers
        self.find_known, self.frames = loaded.find_known, loaded.frames
        decider, generator = loaded.answering.decider, loaded.answering.generator
        self.temperature = decider.temperature if isinstance(decider, ReviewDecider) else None
        """Temperature that the probabilities of the run's question are scaled by; None if they are not."""
        self.samples = (
            decider.samples
            if isinstance(decider, AnswerDecider)
            else 0
            if generator is None
            else generator.options.samples
        )
        """Traces per clip of the run; 0 if the model decides without traces."""
        self.by_answers = isinstance(decider, AnswerDecider)
        """True if probabilities are shares of sampled answers."""
        self._answering, self._fabric = loaded.answering, loaded.fabric
        self._decider = ClipDecider(loaded, batch_size)
        self._bound_memory()

    def _bound_memory(self) -> None:
        """Makes memory independent of the number of clips that were asked about, and of the answers of a request."""
        asked = [(self._answering.vlm, self._answering.model)]
        if self._answering.generator is not None:
            asked.append((self._answering.generator.vlm, self._answering.writer))
        for vlm, model in asked:
            if vlm.vision_cache_options is not None:  # clips of clients are not kept on disk
                vlm.vision_cache_options = VisionCacheOptions(memory_gb=_VISION_GB)
                vlm.__dict__.pop("vision_cache", None)
                vlm.expect(model)
            if vlm.route != "naive" and vlm.completion_chunk is None and vlm.text_memory_gb is None:
                vlm.text_memory_gb = _TEXT_GB

    def answer(self, jobs: Sequence[Job]) -> list[Answer | Refused]:
        """Answers jobs together, or one by one if the model does not take them together.

        Args:
            jobs: At least one.

        Returns:
            The answer of each job, or why it has none.
        """
        try:
            return list(self._answer(jobs))
        except (ValueError, torch.OutOfMemoryError) as error:
            if len(jobs) > 1:  # which of them it is, only single ones tell
                return [one for job in jobs for one in self.answer([job])]
            # of what is too long for the context, a client can change the words only
            why = str(error).replace(f": {REMEDY}", ": send less text, or fewer or shorter answers")
            return [Refused(why, bool(jobs[0].others.questions) and isinstance(error, ValueError))]

    def _answer(self, jobs: Sequence[Job]) -> list[Answer]:
        start = time.perf_counter()
        own, others = self._own(jobs), self._others(jobs)
        seconds, answers = time.perf_counter() - start, list[Answer]()
        for number, job in enumerate(jobs):
            decided, (probs, read) = own.get(number), others.get(number, ((), 0))
            written = 0
            if decided is not None:
                read += decided.input_tokens
                written = sum(trace.n_tokens or 0 for trace in decided.decisions.traces[decided.row])
            mine = None if decided is None else self._own_answer(decided, job.samples)
            answers.append(Answer(mine, probs, read, written, len(jobs), seconds))
        return answers

    def _own(self, jobs: Sequence[Job]) -> dict[int, DecidedClip]:
        """Returns the decisions of the jobs that ask the question of the run, by their number."""
        found: dict[int, DecidedClip] = {}
        for samples in {job.samples for job in jobs if job.own}:
            group = {number: job for number, job in enumerate(jobs) if job.own and job.samples == samples}
            # the same clip may be asked about by several requests; it is decided once, as its id goes by its content
            held = {job.clip.video_id: self._decider.data.hold(job.clip, job.video) for job in group.values()}
            decided = dict(zip(held, self._decider.decide(list(held.values()), samples), strict=True))
            for number, job in group.items():
                one = decided[job.clip.video_id]
                if isinstance(one, str):
                    raise ValueError(one)
                found[number] = one
        return found

    def _others(self, jobs: Sequence[Job]) -> dict[int, tuple[tuple[Probabilities, ...], int]]:
        """Returns the probabilities of all other questions and their input tokens, by the number of the job."""
        group = {str(number): job for number, job in enumerate(jobs) if job.others.questions}
        if not group:
            return {}
        asked = {name: job.others for name, job in group.items()}
        data = self._decider.data
        clips = [data.hold(replace(job.clip, video_id=name), job.video) for name, job in group.items()]
        vlm, size = self._answering.vlm, self._answering.clips_per_forward
        found: dict[int, tuple[tuple[Probabilities, ...], int]] = {}
        with torch.inference_mode(), self._fabric.autocast(), quietly():
            for batch in self._decider.batches(clips, OpenQuestionsView(self.task, asked)):
                for part in split_clips(vlm, batch, size):
                    probs = answer_open_questions(vlm, self._answering.model, part, asked)
                    tokens = input_tokens(part)
                    found |= {int(name): (probs[name], tokens[name]) for name in part.video_ids}
        return found

    def _own_answer(self, decided: DecidedClip, samples: int | None) -> OwnAnswer:
        decisions, row = decided.decisions, decided.row
        probs = dict(zip(self.task.label_names, decisions.probs[row].tolist(), strict=True))
        chosen = int(decisions.pred[row])
        threshold = self.threshold
        # A threshold holds for the number of traces that it was fitted with.
        if threshold is not None and samples not in (None, threshold.samples):
            threshold = None
        reason = "no_answer" if chosen < 0 else None
        if reason is None and threshold is not None and not threshold.accepts(decided.unscaled):
            reason = "below_threshold"
        name = self.task.label_names[chosen] if chosen >= 0 else None
        return OwnAnswer(probs, name, reason, threshold, decisions.traces[row])
