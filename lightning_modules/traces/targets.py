"""The target texts of supervised fine-tuning, by video id."""

from __future__ import annotations

import random
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
    """Options of the target texts.

    Args:
        kind: ``caption``: a column of the manifest; ``rationale``: the model's own descriptions; ``trace``: reasoning
            and answer in the grammar of ``rewards/completion.py``; ``label``: the class name.
        compose: Source of a ``trace``: ``describe`` joins a description and the training label, ``reason`` takes the
            model's own traces whose answer is the label, ``reason_first`` takes these and joins description and label
            for the clips without one.
        caption_field: Column of the manifest for ``caption``.
        answer_weight: Weight of the mean loss of the answer, added to that of the reasoning; null is one mean over all
            tokens.
        swapped: Number of traces about other clips behind each video, of which only the answer is learnt. What the
            video shows does not fit these, so that the answer has to be read from the reasoning.
    """

    kind: Literal["caption", "rationale", "trace", "label"] = "label"
    compose: Literal["describe", "reason", "reason_first"] = "describe"
    caption_field: str = "caption"
    answer_weight: float | None = 1.0
    swapped: int = 0

    def __post_init__(self) -> None:
        if self.swapped < 0 or (self.swapped and self.kind != "trace"):
            raise ValueError(f"targets.swapped: {self.swapped}: must be 0, or more than 0 with targets.kind trace")


def caption_targets(clips: Iterable[Clip], field: str) -> Texts:
    """Returns the captions of clips in the manifest's column ``field``; clips without one are left out."""
    return {clip.video_id: (clip.fields[field].strip(),) for clip in clips if clip.fields.get(field, "").strip()}


def rationale_targets(records: Mapping[str, Sequence[TraceRecord]]) -> Texts:
    """Returns the texts of the rationales that were not rejected."""
    return {video_id: tuple(r.text.strip() for r in group if r.kept) for video_id, group in records.items()}


def trace_targets(
    clips: Iterable[Clip],
    records: Mapping[str, Sequence[TraceRecord]],
    compose: Literal["describe", "reason"],
    label_names: Sequence[str],
    form: CompletionForm = THINK_FORM,
) -> Texts:
    """Returns traces whose answer is the training label.

    Args:
        clips: The training clips.
        records: Texts by video id.
        compose: ``describe`` takes the model's description as reasoning and the training label as answer; ``reason``
            takes the model's own traces whose answer is the label.
        label_names: All class names.
        form: Blocks that a trace consists of. Without reasoning, all traces of a clip are equal and one is returned.

    Raises:
        ValueError: If the form has a confidence, for which there is no target.
    """
    # Only rewards can teach confidences, since they depend on how often the policy is right.
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


def swapped_targets(texts: Texts, number: int, seed: int = 0) -> Texts:
    """Returns ``number`` traces about other clips for every clip that has traces.

    Args:
        texts: Traces by video id.
        number: Traces about other clips behind each video; at most the number of other clips that have traces.
        seed: Seed of the choice. It is random, since the labels of clips in order may follow each other in a pattern.
    """
    owners = [video_id for video_id, own in texts.items() if own]
    generator = random.Random(seed)
    swapped: Texts = {}
    for place, video_id in enumerate(owners):
        others = [*owners[:place], *owners[place + 1 :]]
        chosen = generator.sample(others, min(number, len(others)))
        swapped[video_id] = tuple(generator.choice(texts[other]) for other in chosen)
    return swapped


def traces_or_composed(traces: Texts, composed: Texts) -> tuple[Texts, str]:
    """Completes the model's own traces by texts that were composed of its descriptions and the labels.

    Args:
        traces: Traces whose answer is the label; a clip without one has an empty tuple.
        composed: Composed texts of the clips that lack traces.

    Returns:
        The texts by video id, and a sentence with the number and share of clips by where their texts come from.
    """
    texts = {video_id: own or composed.get(video_id, ()) for video_id, own in traces.items()}
    own, any_text = (sum(map(bool, found.values())) for found in (traces, texts))
    counts = (
        (own, "from own traces that end in the label"),
        (any_text - own, "from own descriptions composed with the label"),
        (len(texts) - any_text, "from nothing"),
    )
    return texts, ", ".join(f"{n} ({n / max(len(texts), 1):.0%}) {what}" for n, what in counts)


def _composed(record: TraceRecord, label: str, label_names: Sequence[str], form: CompletionForm) -> str | None:
    reasoning = record.reasoning if record.reasoning is not None else record.text
    try:
        return render_completion(reasoning.strip(), label, form)
    except ValueError:  # a description that contains a tag cannot be part of a trace
        return None


def _right(record: TraceRecord, label: str, label_names: Sequence[str], form: CompletionForm) -> str | None:
    if match_label(record.answer, label_names) != label:
        return None
    if record.reasoning is None and form.mode != "no_think":
        return None
    return render_completion(record.reasoning or "", label, form)
