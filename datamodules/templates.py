"""The default prompt templates.

A template may use ``{question}``, ``{classes}`` (names with definitions), ``{names}`` (names alone) and ``{fields}``
(the metadata that the task allows).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from vidreason.rewards.completion import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    CONFIDENCE_CLOSE,
    CONFIDENCE_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    CompletionMode,
)

PromptKind = Literal["describe", "reason", "answer", "answer_first", "label", "calibrate"]

REASON_KINDS: Mapping[CompletionMode, PromptKind] = {
    "think": "reason",
    "no_think": "answer",
    "answer_first": "answer_first",
}
"""The template for each mode of a completion."""

DEFAULT_TEMPLATES: Mapping[str, str] = {
    "describe": (
        "{question}\n{fields}\nThe possible answers are:\n{classes}\n"
        "Describe what happens in the video, in which order it happens, and which evidence bears on these answers."
    ),
    "reason": (
        "{question}\n{fields}\nThe possible answers are:\n{classes}\n"
        f"First reason about what happens in the video between {THINK_OPEN} and {THINK_CLOSE}. "
        f"Then write exactly one of these answers between {ANSWER_OPEN} and {ANSWER_CLOSE}: {{names}}."
    ),
    "answer": (
        "{question}\n{fields}\nThe possible answers are:\n{classes}\n"
        f"Write exactly one of these answers between {ANSWER_OPEN} and {ANSWER_CLOSE}, and nothing else: {{names}}."
    ),
    "answer_first": (
        "{question}\n{fields}\nThe possible answers are:\n{classes}\n"
        f"First write exactly one of these answers between {ANSWER_OPEN} and {ANSWER_CLOSE}: {{names}}. "
        f"Then say between {THINK_OPEN} and {THINK_CLOSE} what happens in the video that shows it."
    ),
    "label": (
        "{question}\n{fields}\nThe possible answers are:\n{classes}\nAnswer with exactly one of these words: {names}."
    ),
    "calibrate": (
        "{question}\n{fields}\nThe possible answers are:\n{classes}\n"
        "A first observer has watched this video; their account and conclusion follow, and may be wrong. "
        "Check them against the video and the definitions, then answer with exactly one of these words: {names}."
    ),
}

LABEL_HINT = "\nThe right answer is: {label}. Say what in the video shows it, without mentioning that you were told."

CONFIDENCE_REQUEST = (
    f"\nAt the end state between {CONFIDENCE_OPEN} and {CONFIDENCE_CLOSE} how sure you are that the answer is right, "
    "as a number from 0 to 1."
)
