"""Which texts supervised fine-tuning learns, by video id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from vidreason.datamodules.traces import TraceRecord
from vidreason.datamodules.types import Clip
from vidreason.rewards.completion import match_label, render_completion

Texts = dict[str, tuple[str, ...]]


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
) -> Texts:
    """Returns traces that end in the training label.

    Args:
        clips: The training clips.
        records: Texts by video id.
        compose: ``describe``: the model's own description is the reasoning and the training label the answer;
            ``reason``: the model's own traces, those whose answer is the label.
        label_names: All classes.
    """
    make = _composed if compose == "describe" else _right
    return {
        clip.video_id: tuple(
            text
            for record in records.get(clip.video_id, ())
            if record.kept and (text := make(record, clip.label, label_names)) is not None
        )
        for clip in clips
        if clip.label is not None
    }


def _composed(record: TraceRecord, label: str, label_names: Sequence[str]) -> str | None:
    reasoning = record.reasoning if record.reasoning is not None else record.text
    try:
        return render_completion(reasoning.strip(), label)
    except ValueError:  # a tag inside the description: it cannot stand in a trace
        return None


def _right(record: TraceRecord, label: str, label_names: Sequence[str]) -> str | None:
    if match_label(record.answer, label_names) != label or record.reasoning is None:
        return None
    return render_completion(record.reasoning, label)
