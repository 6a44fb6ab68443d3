"""Answers of a model to questions that it was not trained on: the likelihood of each possible answer, without a trace.

All questions about a clip stand behind one prefill of it: the clip, behind it the words of the request, behind these
each question, and behind each question its possible answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vidreason.datamodules.prompts import ClipView
from vidreason.datamodules.task import Task
from vidreason.datamodules.types import Clip, Prompt, Text, TextBatch, VideoBatch
from vidreason.lightning_modules.functional.finite import check_rows
from vidreason.lightning_modules.functional.reductions import sequence_logprobs
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.loading.adapters import use_adapter
from vidreason.serving.questions import Question

Probabilities = tuple[float, ...]


@dataclass(frozen=True)
class Asked:
    """Questions about one clip."""

    questions: tuple[Question, ...]
    words: str = ""
    """Words of the request, which stand in front of each question."""


class OpenQuestionsView(ClipView):
    """Shows a clip with the questions that were asked about it.

    Args:
        task: The task of the run; its prompts are not used.
        asked: Questions by video id.
    """

    kind = "label"

    def __init__(self, task: Task, asked: Mapping[str, Asked]) -> None:
        super().__init__(task)
        self.asked = asked

    def prompt(self, clip: Clip) -> Prompt:
        """Returns a prompt that has the video only, and is left open for the questions."""
        return Prompt("", open=True)

    def texts(self, clip: Clip) -> tuple[Text, ...]:
        """Returns the words of the request, each question behind them, and behind each question its answers."""
        asked, texts = self.asked[clip.video_id], list[Text]()
        if asked.words:
            texts.append(Text(f"{asked.words}\n\n", role="context"))
        root = len(texts) - 1
        for question in asked.questions:
            parent = len(texts)
            texts.append(Text(question.task().prompt_text("label", {}), role="context", parent=root))
            texts.extend(Text(name, parent=parent) for name in question.names)
        return tuple(texts)


def answer_open_questions(
    vlm: VLM, model: nn.Module, batch: VideoBatch, asked: Mapping[str, Asked]
) -> dict[str, tuple[Probabilities, ...]]:
    """Returns for each clip the probabilities of the answers of its questions, by video id.

    Args:
        vlm: The model family.
        model: The base, or a model that holds it with adapters, which are off.
        batch: Clips, encoded with an ``OpenQuestionsView``.
        asked: Questions by video id.
    """
    with use_adapter(model, None):
        logprobs = vlm.score(model, batch.prompts, batch.texts).logprobs
    scores = _scores_by_question(logprobs, batch.texts)
    found: dict[str, tuple[Probabilities, ...]] = {}
    for owner, name in enumerate(batch.video_ids):
        rows = scores[owner]
        assert [len(row) for row in rows] == [len(question.names) for question in asked[name].questions]
        for row in rows:
            check_rows(row[None], [name], "the log-likelihoods of the answers are")
        found[name] = tuple(tuple(row.log_softmax(-1).exp().tolist()) for row in rows)
    return found


def _scores_by_question(logprobs: Tensor, texts: TextBatch) -> dict[int, Sequence[Tensor]]:
    """Returns the log-likelihoods [C] float64 of the answers of each question, in order, by index of the clip."""
    scores = sequence_logprobs(logprobs, texts.loss_mask).double().cpu()
    grouped: dict[tuple[int, int], list[int]] = {}
    counts = texts.loss_mask.any(dim=1).tolist()
    for row, (owner, parent) in enumerate(zip(texts.owner.tolist(), texts.parent.tolist(), strict=True)):
        if counts[row]:
            grouped.setdefault((owner, parent), []).append(row)
    found: dict[int, list[Tensor]] = {}
    for (owner, _), rows in grouped.items():
        found.setdefault(owner, []).append(scores[torch.tensor(rows)])
    return dict(found)
