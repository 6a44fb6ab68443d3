"""Refuses words of a task or of a clip's metadata that the model would take for special tokens.

In a prompt, such words would close the user's turn or stand for pixels. They are refused and not spelt out, since they
are hardly ever meant: they come from chat records of another model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from vidreason.datamodules.task import Task
from vidreason.datamodules.types import BatchEncoder, Clip

REMEDY = "remove it, or write it differently"


def any_token(special: Collection[str]) -> re.Pattern[str]:
    """Returns a pattern that finds any of the tokens ``special``; without tokens, one that finds nothing.

    >>> any_token(["<video>", "<image>"]).search("<image> What happens?")[0]
    '<image>'
    """
    # The longest first, so that a token which begins like another is reported as itself.
    tokens = [re.escape(token) for token in sorted(special, key=len, reverse=True) if token]
    return re.compile("|".join(tokens) or r"(?!)")


def check_words(task: Task, clips: Iterable[Clip], encoder: BatchEncoder | None) -> None:
    """Checks that neither a task nor the metadata that it shows contain a special token of the model.

    Args:
        task: Question, classes and prompt templates.
        clips: Clips whose columns ``task.metadata_fields`` may enter prompts.
        encoder: The model family, whose ``special_tokens`` these are; there are none without this attribute.

    Raises:
        ValueError: If there is such a token; the message names file and field.
    """
    pattern = any_token(getattr(encoder, "special_tokens", ()))
    for where, text in _fields(task, clips):
        if found := pattern.search(text):
            raise ValueError(f"{where} contains {found[0]}, a special token of the model: {REMEDY}")


def _fields(task: Task, clips: Iterable[Clip]) -> Iterator[tuple[str, str]]:
    file = task.file or f"task {task.name}"
    yield f"{file}: 'question'", task.question
    for number, spec in enumerate(task.classes):
        yield f"{file}: 'classes[{number}].name'", spec.name
        yield f"{file}: 'classes[{number}].definition'", spec.definition
    for kind, template in task.prompts.items():
        yield f"{file}: 'prompts.{kind}'", template
    for name in task.metadata_fields:
        yield f"{file}: 'metadata_fields'", name
    for clip in clips:
        for name in task.metadata_fields:
            yield f"{clip.where or clip.video_id}: '{name}'", clip.fields.get(name, "")
