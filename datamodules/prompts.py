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
    """Defines what a stage shows the model of a clip, and the texts behind it.

    A subclass names its ``kind`` (the template it uses) and, where it has targets or candidates, overrides ``texts``.

    Args:
        task: Classes, question and templates.
    """

    kind: PromptKind
    shows_video: bool = True
    """False shows the model a black video of the same length instead of the frames."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def prompt(self, clip: Clip) -> Prompt:
        """Returns the user's turn, which follows the video."""
        return Prompt(self.task.prompt_text(self.kind, clip.fields))

    def texts(self, clip: Clip) -> tuple[Text, ...]:
        """Returns the texts behind the prompt; none by default."""
        return ()

    def keep(self, clip: Clip) -> bool:
        """Returns False if the clip has no target, so that training leaves it out; evaluation uses every clip."""
        return True

    def sha(self) -> str:
        """Returns the hash of the prompt without metadata; the ``prompt_sha`` of traces written with it."""
        return hashlib.sha256(self._template().encode()).hexdigest()

    def _template(self) -> str:
        marks = {name: f"<{name}>" for name in self.task.metadata_fields}
        return f"{self.kind}\n{self.task.prompt_text(self.kind, marks)}"


class _TextsByVideo(ClipView):
    """A view with optional target texts by video id; several texts of a clip share its prompt."""

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
        task: Classes, question and templates.
        texts: Target texts by video id (rationale SFT); None where descriptions are generated.
        label_hint: Shows the true label in the prompt.
    """

    kind = "describe"

    def __init__(
        self, task: Task, texts: Mapping[str, tuple[str, ...]] | None = None, label_hint: bool = False
    ) -> None:
        super().__init__(task, texts)
        self.label_hint = label_hint

    def prompt(self, clip: Clip) -> Prompt:
        """Returns the prompt for a description, followed by the label if ``label_hint`` is set.

        Raises:
            ValueError: If ``label_hint`` is set and the clip has no label.
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
    """Asks for ``<think>…</think><answer>…</answer>``; has targets in cold start, none in GRPO and generation.

    Args:
        task: Classes, question and templates.
        texts: Target completions by video id, or None.
        form: Which blocks are asked for, in which order.
    """

    kind: PromptKind = "reason"

    def __init__(
        self, task: Task, texts: Mapping[str, tuple[str, ...]] | None = None, form: CompletionForm = THINK_FORM
    ) -> None:
        super().__init__(task, texts)
        self.kind = REASON_KINDS[form.mode]
        self.form = form

    def prompt(self, clip: Clip) -> Prompt:
        """Returns the prompt of the form's mode, followed by the request for a confidence if the form has one."""
        prompt = super().prompt(clip)
        return Prompt(prompt.text + CONFIDENCE_REQUEST) if self.form.confidence else prompt

    def _template(self) -> str:
        return super()._template() + (CONFIDENCE_REQUEST if self.form.confidence else "")


class RewardedView(ReasonView):
    """A ReasonView for clips whose completions are rewarded, so that only labelled clips are kept."""

    def keep(self, clip: Clip) -> bool:
        """Returns whether the clip has a label."""
        return clip.label is not None


class LabelView(ClipView):
    """Asks for the label alone.

    Args:
        task: Classes, question and templates.
        with_targets: Puts the clip's label behind the prompt (training).
    """

    kind = "label"

    def __init__(self, task: Task, with_targets: bool = True) -> None:
        super().__init__(task)
        self.with_targets = with_targets

    def texts(self, clip: Clip) -> tuple[Text, ...]:
        """Returns the clip's label, if targets are needed and it has one."""
        return (Text(clip.label),) if self.with_targets and clip.label is not None else ()

    def keep(self, clip: Clip) -> bool:
        """Returns False if targets are needed and the clip has no label."""
        return clip.label is not None or not self.with_targets


class LabelScoringView(ClipView):
    """Puts every label name as a text behind the prompt, in the order of ``task.label_names``."""

    kind = "label"

    def texts(self, clip: Clip) -> tuple[Text, ...]:
        """Returns one text per class, [C]."""
        return tuple(Text(name) for name in self.task.label_names)


class ReviewView(ClipView):
    """A reviewer's prompt: each trace stands behind the video, and the label names behind each trace.

    With traces the texts of a clip stand as ``trace 0, its C labels, trace 1, its C labels, …``; the traces are context
    in the user's open turn, the labels are answers. With ``input="video"`` there is no trace and the labels stand
    directly behind a closed prompt.

    Args:
        task: Classes, question and templates.
        traces: Completions by video id, as they were generated; a clip without any has no texts.
        labels: ``all`` puts every label name behind a trace (closed-set scoring), ``target`` the clip's own alone.
        input: What the reviewer is given; ``trace`` blanks the video.
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
        """Returns the reviewer's prompt, left open for the traces, or a closed one with ``input="video"``."""
        if self.input == "video":
            return Prompt(self.task.prompt_text("label", clip.fields))
        return Prompt(super().prompt(clip).text, open=True)

    def texts(self, clip: Clip) -> tuple[Text, ...]:
        """Returns traces and labels as a tree of depth two; ``parent`` is an index into this clip's texts."""
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
        """Returns False if the clip has no label, or no trace although one is shown."""
        return clip.label is not None and (self.input == "video" or bool(self.traces.get(clip.video_id)))

    def _names(self, clip: Clip) -> tuple[str, ...]:
        if self.labels == "all":
            return self.task.label_names
        return () if clip.label is None else (clip.label,)

    def _template(self) -> str:
        return f"{self.input}\n{super()._template()}"


def render_review(trace: str) -> str:
    """Returns a trace as the reviewer reads it: account and conclusion in words; unchanged if it cannot be parsed."""
    parsed = parse_completion(trace, CompletionForm("no_think"))
    account = parsed.reasoning if parsed.reasoning is not None else trace.strip()
    if parsed.well_formed:  # an answer and nothing else
        account = "none"
    conclusion = parsed.answer if parsed.answer is not None else "none"
    return f"\nAccount: {account}\nConclusion: {conclusion}"
