"""Detects metadata that reveals the label, such as annotators' notes or scripted file names.

A model that reads the label in its prompt ignores the video. The check only warns, since it cannot know what a field
will hold for new clips.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from vidreason.datamodules.types import Clip

NAMED = 0.1
"""Warn if at least this share of clips name their own label in the field."""
ABOVE_MAJORITY = 0.3
"""Warn if predicting from the field's value alone beats the most frequent label by this accuracy."""


def find_leaks(clips: Sequence[Clip], fields: Sequence[str]) -> list[str]:
    """Returns one line for each field and way in which metadata reveals labels; [] if none does.

    Args:
        clips: Labelled clips, as a rule those of split train.
        fields: Names of the metadata fields that may enter a prompt.

    Example:
        >>> from pathlib import Path
        >>> clips = [Clip(Path("x"), label, str(i), fields={"note": f"he {label}s"})
        ...          for i, label in enumerate(["jump", "walk"] * 5)]
        >>> find_leaks(clips, ["note"])[0]
        "metadata field 'note' names the label of 100 % of the training clips"
    """
    labelled = [clip for clip in clips if clip.label is not None]
    if not labelled:
        return []
    majority = Counter(clip.label for clip in labelled).most_common(1)[0][1] / len(labelled)
    found = []
    for name in fields:
        named = sum(_names(clip.fields.get(name, ""), str(clip.label)) for clip in labelled) / len(labelled)
        if named >= NAMED:
            found.append(f"metadata field {name!r} names the label of {100 * named:.0f} % of the training clips")
        told = value_accuracy(labelled, name)
        if told is not None and told >= majority + ABOVE_MAJORITY:
            found.append(
                f"metadata field {name!r} alone tells the label of {100 * told:.0f} % of the training clips that share "
                f"its value with others (the most frequent label: {100 * majority:.0f} %)"
            )
    return found


def value_accuracy(clips: Sequence[Clip], field: str) -> float | None:
    """Returns the leave-one-out accuracy of predicting the label from the field's value; None if no value repeats.

    Args:
        clips: Labelled clips.
        field: Name of the metadata field; clips without a value are left out.
    """
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    for clip in clips:
        if value := clip.fields.get(field, "").strip():
            groups[value][str(clip.label)] += 1
    right = seen = 0
    for labels in groups.values():
        for label, count in labels.items():
            others = labels - Counter({label: 1})
            if others:
                seen += count
                right += count * (others[label] == max(others.values()) and others[label] > 0)
    return right / seen if seen else None


def _names(text: str, label: str) -> bool:
    """Returns whether a text contains the label as words, in any spacing and with or without a short ending."""
    words = re.escape(re.sub(r"[\W_]+", " ", label.casefold()).strip())
    return bool(words) and re.search(rf"\b{words}\w{{0,3}}\b", re.sub(r"[\W_]+", " ", text.casefold())) is not None
