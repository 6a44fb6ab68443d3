"""The texts that supervised fine-tuning learns, by video id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vidreason.datamodules.traces import TraceRecord
from vidreason.datamodules.types import Clip
from vidreason.rewards.completion import THINK_FORM, CompletionForm, match_label, render_completion

Texts = dict[str, tuple[str, ...]]
"""Target texts by video id."""


@dataclass(frozen=True)
class TargetOptions:
    """Which texts are learnt.

    Args:
        kind: ``caption``: a column of the manifest; ``rationale``: the model's own descriptions; ``trace``: reasoning
            and answer in the grammar of ``rewards/completion.py``; ``label``: the class name.
        compose: How a ``trace`` is made: ``describe`` from a description and the training label, ``reason`` from the
            model's own traces that end in the label.
        caption_field: Manifest column for ``caption``.
        answer_weight: Weight of the answer's mean loss beside the reasoning's; null is one mean over all tokens.
    """

    kind: Literal["caption", "rationale", "trace", "label"] = "label"
    compose: Literal["describe", "reason"] = "describe"
    caption_field: str = "caption"
    answer_weight: float | None = 1.0


def caption_targets(clips: Iterable[Clip], field: str) -> Texts:
    """Returns the caption that each clip's manifest row holds in column ``field``; clips without one do not appear."""
    return {clip.video_id: (clip.fields[field].strip(),) for clip in clips if clip.fields.get(field, "").strip()}


def rationale_targets(records: Mapping[str, Sequence[TraceRecord]]) -> Texts:
    """Returns the kept rationales as they were written."""
    return {video_id: tuple(r.text.strip() for r in group if r.kept) for video_id, group in records.items()}


def trace_targets(
    clips: Iterable[Clip],
    records: Mapping[str, Sequence[TraceRecord]],
    compose: Literal["describe", "reason"],
    label_names: Sequence[str],
    form: CompletionForm = THINK_FORM,
) -> Texts:
    """Returns traces that end in the training label.

    Args:
        clips: The training clips.
        records: Texts by video id.
        compose: ``describe``: the model's own description is the reasoning and the training label the answer;
            ``reason``: the model's own traces, those whose answer is the label.
        label_names: All classes.
        form: Which blocks a trace has. Without reasoning the traces of a clip are all the same, and one is returned.

    Raises:
        ValueError: The form asks for a confidence, which no text of a training clip states.
    """
    if form.confidence:
        raise ValueError("completion.confidence: there is no confidence to learn from; switch it on in GRPO only")
    make = _composed if compose == "describe" else _right
    targets = {
        clip.video_id: tuple(
            text
            for record in records.get(clip.video_id, ())
            if record.kept and (text := make(record, clip.label, label_names, form)) is not None
        )
        for clip in clips
        if clip.label is not None
    }
    return targets if form.mode != "no_think" else {video_id: texts[:1] for video_id, texts in targets.items()}


def _composed(record: TraceRecord, label: str, label_names: Sequence[str], form: CompletionForm) -> str | None:
    reasoning = record.reasoning if record.reasoning is not None else record.text
    try:
        return render_completion(reasoning.strip(), label, form)
    except ValueError:  # a tag inside the description: it cannot stand in a trace
        return None


def _right(record: TraceRecord, label: str, label_names: Sequence[str], form: CompletionForm) -> str | None:
    if match_label(record.answer, label_names) != label:
        return None
    if record.reasoning is None and form.mode != "no_think":
        return None
    return render_completion(record.reasoning or "", label, form)
