"""Views: the prompt about a clip and the texts behind it, as a stage needs them.

The video always comes before the question, so that the part that differs between prompts is at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from copy import copy
from typing import Literal, Self

from vidreason.datamodules.task import Task
from vidreason.datamodules.templates import CONFIDENCE_REQUEST, LABEL_HINT, REASON_KINDS, PromptKind
from vidreason.datamodules.types import Clip, Prompt, Text
from vidreason.rewards.completion import (
    THINK_FORM,
    CompletionForm,
    parse_completion,
    render_completion,
    render_reasoning,
)

ReviewInput = Literal["video+trace", "video+reasoning", "trace", "video"]
"""The inputs of a reviewer, which decides about a clip after a policy has written reasoning traces about it.

``video+trace`` and ``trace`` show the reasoning and its conclusion in the user's turn, as the account of an observer;
``trace`` shows a black video. With ``video+reasoning`` the reviewer is asked what the policy was asked, its own turn
begins with the reasoning, and its answer continues it; it does not see the conclusion. ``video`` has no trace.
"""

_REVIEW_KINDS: Mapping[ReviewInput, PromptKind] = {
    "video+trace": "calibrate",
    "video+reasoning": "reason",
    "trace": "calibrate",
    "video": "label",
}


class ClipView:
    """Defines the prompt about a clip and the texts behind it.

    A subclass sets ``kind``, the template that it uses, and overrides ``texts`` if it has targets or candidates.

    Args:
        task: Classes, question and templates.
    """

    kind: PromptKind
    shows_video: bool = True
    """If False, the frames are replaced by a black video of the same length."""

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

    def with_texts(self, texts: Mapping[str, tuple[str, ...]]) -> Self:
        """Returns a copy with other target texts."""
        view = copy(self)
        view.targets = texts
        return view


class DescribeView(_TextsByVideo):
    """Asks for a description of the events and of the evidence for the classes.

    Args:
        task: Classes, question and templates.
        texts: Target texts by video id; None to generate descriptions.
        label_hint: Whether the prompt contains the true label.
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
        form: Blocks of the completion, in order.
        swapped: Completions about other clips by video id, of which only the answer is learnt.
    """

    kind: PromptKind = "reason"

    def __init__(
        self,
        task: Task,
        texts: Mapping[str, tuple[str, ...]] | None = None,
        form: CompletionForm = THINK_FORM,
        swapped: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        super().__init__(task, texts)
        self.kind = REASON_KINDS[form.mode]
        self.form = form
        self.swapped = swapped or {}

    def texts(self, clip: Clip) -> tuple[Text, ...]:
        """Returns the clip's own completions, then the swapped ones."""
        other = self.swapped.get(clip.video_id, ())
        return (*super().texts(clip), *(Text(text, learnt="answer") for text in other))

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
    """Asks for the label only.

    Args:
        task: Classes, question and templates.
        with_targets: Whether the clip's label follows the prompt as target text.
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
    """Asks for the label, with every label name as a text, in the order of ``task.label_names``."""

    kind = "label"

    def texts(self, clip: Clip) -> tuple[Text, ...]:
        """Returns one text per class, [C]."""
        return tuple(Text(name) for name in self.task.label_names)


class ReviewView(ClipView):
    """A reviewer's prompt: traces follow the video, and label names follow each trace.

    The texts of a clip are ``trace 0, its C labels, trace 1, its C labels, …``; traces are context in the open user's
    turn, or with ``input="video+reasoning"`` the beginning of the assistant's; labels are answers. With
    ``input="video"`` there are no traces, and the labels follow a closed prompt.

    Args:
        task: Classes, question and templates.
        traces: Generated completions by video id; a clip without any has no texts.
        labels: Labels behind each trace: ``all`` names (closed-set scoring) or the clip's own (``target``).
        input: Inputs of the reviewer.
    """

    kind: PromptKind = "calibrate"

    def __init__(
        self,
        task: Task,
        traces: Mapping[str, tuple[str, ...]],
        labels: Literal["all", "target"] = "all",
        input: ReviewInput = "video+trace",
    ) -> None:
        super().__init__(task)
        self.kind = _REVIEW_KINDS[input]
        self.traces = traces
        self.labels = labels
        self.input = input
        self.shows_video = input != "trace"

    def prompt(self, clip: Clip) -> Prompt:
        """Returns the reviewer's prompt, left open where traces are part of the user's turn."""
        return Prompt(super().prompt(clip).text, open=self.kind == "calibrate")

    def texts(self, clip: Clip) -> tuple[Text, ...]:
        """Returns traces and labels as a tree of depth two; ``parent`` is an index into this clip's texts."""
        names = self._names(clip)
        if self.input == "video":
            return tuple(Text(name) for name in names)
        texts: list[Text] = []
        for trace in self.traces.get(clip.video_id, ()):
            parent = len(texts)
            if self.input == "video+reasoning":
                texts.append(Text(render_reasoning(trace), role="draft"))
                names = tuple(render_completion("", name, CompletionForm("no_think")) for name in self._names(clip))
            else:
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
    """Returns a trace without tags, as ``Account: …`` and ``Conclusion: …``, for the reviewer's prompt."""
    parsed = parse_completion(trace, CompletionForm("no_think"))
    account = parsed.reasoning if parsed.reasoning is not None else trace.strip()
    if parsed.well_formed:  # an answer and nothing else
        account = "none"
    conclusion = parsed.answer if parsed.answer is not None else "none"
    return f"\nAccount: {account}\nConclusion: {conclusion}"
