"""Views: what a stage shows the model of a clip, as a prompt and the texts behind it.

The video always comes first and the question behind it, so that the part that differs between prompts is at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

from vidreason.datamodules.task import Task
from vidreason.datamodules.templates import CONFIDENCE_REQUEST, LABEL_HINT, REASON_KINDS, PromptKind
from vidreason.datamodules.types import Clip, Prompt, Text
from vidreason.rewards.completion import (
    THINK_FORM,
    CompletionForm,
    parse_completion,
)


class ClipView:
    """What a stage shows the model of a clip, and the texts it puts behind it.

    A subclass names its ``kind`` (the template it uses) and, where it has targets or candidates, overrides ``texts``.

    Args:
        task: classes, question and templates.
    """

    kind: PromptKind
    shows_video: bool = True
    """False blanks the frames: the model is shown a black video of the same length."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def prompt(self, clip: Clip) -> Prompt:
        """The user's turn behind the clip's video."""
        return Prompt(self.task.prompt_text(self.kind, clip.fields))

    def texts(self, clip: Clip) -> tuple[Text, ...]:
        """The texts behind the prompt; none by default."""
        return ()

    def keep(self, clip: Clip) -> bool:
        """False where the clip has no target and is left out of training; evaluation never leaves a clip out."""
        return True

    def sha(self) -> str:
        """Hash of the prompt that every clip shares, metadata aside; ``prompt_sha`` of the traces written with it."""
        return hashlib.sha256(self._template().encode()).hexdigest()

    def _template(self) -> str:
        marks = {name: f"<{name}>" for name in self.task.metadata_fields}
        return f"{self.kind}\n{self.task.prompt_text(self.kind, marks)}"


class _TextsByVideo(ClipView):
    """A view whose targets, if any, are looked up by video id; several texts of a clip share its prompt."""

    def __init__(self, task: Task, texts: Mapping[str, tuple[str, ...]] | None = None) -> None:
        super().__init__(task)
        self.targets = texts

    def texts(self, clip: Clip) -> tuple[Text, ...]:
        return tuple(Text(text) for text in (self.targets or {}).get(clip.video_id, ()))

    def keep(self, clip: Clip) -> bool:
        return self.targets is None or bool(self.targets.get(clip.video_id))


class DescribeView(_TextsByVideo):
    """Asks for a description of what happens and which evidence bears on the classes.

    Args:
        task: classes, question and templates.
        texts: target texts by video id (rationale SFT); None where descriptions are generated.
        label_hint: shows the true label in the prompt.
    """

    kind = "describe"

    def __init__(
        self, task: Task, texts: Mapping[str, tuple[str, ...]] | None = None, label_hint: bool = False
    ) -> None:
        super().__init__(task, texts)
        self.label_hint = label_hint

    def prompt(self, clip: Clip) -> Prompt:
        """The describing prompt, with the label behind it where ``label_hint`` is on.

        Raises:
            ValueError: if the hint is on and the clip has no label.
        """
        prompt = super().prompt(clip)
        if not self.label_hint:
            return prompt
        if clip.label is None:
            raise ValueError(f"{clip.video_id} ({clip.where}) has no label to show: turn label_hint off")
        return Prompt(prompt.text + LABEL_HINT.replace("{label}", clip.label))

    def _template(self) -> str:
        return super()._template() + (LABEL_HINT if self.label_hint else "")


class ReasonView(_TextsByVideo):
    """Asks for ``<think>…</think><answer>…</answer>``: cold start with targets; GRPO and generation without.

    Args:
        task: classes, question and templates.
        texts: target completions by video id, or None.
        form: which blocks are asked for, in which order.
    """

    kind: PromptKind = "reason"

    def __init__(
        self, task: Task, texts: Mapping[str, tuple[str, ...]] | None = None, form: CompletionForm = THINK_FORM
    ) -> None:
        super().__init__(task, texts)
        self.kind = REASON_KINDS[form.mode]
        self.form = form

    def prompt(self, clip: Clip) -> Prompt:
        """The prompt of the form's mode, with the request for a confidence behind it where the form has one."""
        prompt = super().prompt(clip)
        return Prompt(prompt.text + CONFIDENCE_REQUEST) if self.form.confidence else prompt

    def _template(self) -> str:
        return super()._template() + (CONFIDENCE_REQUEST if self.form.confidence else "")


class RewardedView(ReasonView):
    """As ReasonView, for clips whose completions are rewarded: they need a label."""

    def keep(self, clip: Clip) -> bool:
        """False for an unlabelled clip."""
        return clip.label is not None


class LabelView(ClipView):
    """Asks for the label alone.

    Args:
        task: classes, question and templates.
        with_targets: puts the clip's label behind the prompt (training).
    """

    kind = "label"

    def __init__(self, task: Task, with_targets: bool = True) -> None:
        super().__init__(task)
        self.with_targets = with_targets

    def texts(self, clip: Clip) -> tuple[Text, ...]:
        """The clip's label, where targets are wanted and it has one."""
        return (Text(clip.label),) if self.with_targets and clip.label is not None else ()

    def keep(self, clip: Clip) -> bool:
        """False for an unlabelled clip where targets are wanted."""
        return clip.label is not None or not self.with_targets


class LabelScoringView(ClipView):
    """Every label name as a text behind the prompt, in the order of ``task.label_names``."""

    kind = "label"

    def texts(self, clip: Clip) -> tuple[Text, ...]:
        """One text per class [C]."""
        return tuple(Text(name) for name in self.task.label_names)


class ReviewView(ClipView):
    """A reviewer's prompt: behind the video each trace, and behind each trace the label names.

    With traces the texts of a clip stand as ``trace 0, its C labels, trace 1, its C labels, …``; the traces are context
    in the user's open turn, the labels are answers. With ``input="video"`` there is no trace and the labels stand
    directly behind a closed prompt.

    Args:
        task: classes, question and templates.
        traces: completions by video id, as they were generated; a clip without any has no texts.
        labels: ``all`` puts every label name behind a trace (closed-set scoring), ``target`` the clip's own alone.
        input: what the reviewer is given; ``trace`` blanks the video.
    """

    kind = "calibrate"

    def __init__(
        self,
        task: Task,
        traces: Mapping[str, tuple[str, ...]],
        labels: Literal["all", "target"] = "all",
        input: Literal["video+trace", "trace", "video"] = "video+trace",
    ) -> None:
        super().__init__(task)
        self.traces = traces
        self.labels = labels
        self.input = input
        self.shows_video = input != "trace"

    def prompt(self, clip: Clip) -> Prompt:
        """The reviewer's prompt, left open for the traces; the plain label prompt with ``input="video"``."""
        if self.input == "video":
            return Prompt(self.task.prompt_text("label", clip.fields))
        return Prompt(super().prompt(clip).text, open=True)

    def texts(self, clip: Clip) -> tuple[Text, ...]:
        """Traces and labels as a tree of depth two; ``parent`` counts within this clip's texts."""
        names = self._names(clip)
        if self.input == "video":
            return tuple(Text(name) for name in names)
        texts: list[Text] = []
        for trace in self.traces.get(clip.video_id, ()):
            parent = len(texts)
            texts.append(Text(render_review(trace), role="context"))
            texts.extend(Text(name, parent=parent) for name in names)
        return tuple(texts)

    def keep(self, clip: Clip) -> bool:
        """False for a clip that has no label, or no trace where one is shown."""
        return clip.label is not None and (self.input == "video" or bool(self.traces.get(clip.video_id)))

    def _names(self, clip: Clip) -> tuple[str, ...]:
        if self.labels == "all":
            return self.task.label_names
        return () if clip.label is None else (clip.label,)

    def _template(self) -> str:
        return f"{self.input}\n{super()._template()}"


def render_review(trace: str) -> str:
    """A trace as the reviewer reads it: account and conclusion in plain words, an unparseable one as it stands."""
    parsed = parse_completion(trace, CompletionForm("no_think"))
    account = parsed.reasoning if parsed.reasoning is not None else trace.strip()
    if parsed.well_formed:  # an answer and nothing else
        account = "none"
    conclusion = parsed.answer if parsed.answer is not None else "none"
    return f"\nAccount: {account}\nConclusion: {conclusion}"
