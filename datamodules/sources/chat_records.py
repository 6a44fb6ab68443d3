"""Reads the chat records of ms-swift and LLaMA-Factory: messages about a video, the last of which is the label."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vidreason.datamodules.sources.rows import Record, Row, Table
from vidreason.rewards.completion import parse_completion

_MESSAGE_KEYS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
_PLACEHOLDER = re.compile(r"<video>\s*")
_LONGEST_LABEL = 200  # characters


@dataclass(frozen=True)
class Chats:
    """Chat records as a table."""

    table: Table
    """Columns ``path`` and ``label``, and every further key of the records"""
    question: str
    """The question of all records; empty if they differ"""


def holds_chats(records: Sequence[Record]) -> bool:
    """Returns whether these are chat records, not rows of a table."""
    return any(isinstance(records[0].content.get(key), list) for key in _MESSAGE_KEYS) if records else False


def table_of_chats(records: Sequence[Record], name: str) -> Chats:
    """Reads one clip and one label out of every record.

    The label is the last message of the assistant, or what stands in its ``<answer>``.

    Args:
        records: Objects with ``messages`` (or ShareGPT's ``conversations``) and ``videos``.
        name: What the file is called in messages.

    Raises:
        ValueError: If a record does not have one video and an answer, or if answers are free text.
    """
    rows, questions = [], set()
    columns = {"path": None, "label": None}
    for record in records:
        where = f"{name}, {record.place}"
        messages = _messages(record.content, where)
        answers = [text for role, text in messages if role == "assistant"]
        if not answers:
            raise ValueError(f"{where}: no message of the assistant, which is the label")
        label = (parse_completion(answers[-1]).answer or answers[-1]).strip()
        if "\n" in label or len(label) > _LONGEST_LABEL:
            raise ValueError(f"{where}: the answer is a text and no class name: {label[:60]!r}…")
        questions.add("\n".join(_PLACEHOLDER.sub("", text).strip() for role, text in messages if role == "user"))
        others = {
            key: value if isinstance(value, str) else str(value)
            for key, value in record.content.items()
            if key not in (*_MESSAGE_KEYS, "videos", "video", "path", "label") and isinstance(value, str | int | float)
        }
        rows.append(Row(record.place, {"path": _video(record.content, where), "label": label, **others}))
        columns.update(dict.fromkeys(others))
    labels = {row.get("label") for row in rows}
    if len(rows) > 10 and len(labels) > len(rows) / 2:
        raise ValueError(
            f"{name}: {len(labels)} different answers in {len(rows)} records are no class names; "
            "give a table with a label per clip"
        )
    return Chats(Table(tuple(columns), tuple(rows)), questions.pop() if len(questions) == 1 else "")


def _messages(content: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    """Returns (role, text) of each message, in either format."""
    given = next((content[key] for key in _MESSAGE_KEYS if key in content), None)
    messages = []
    for item in given if isinstance(given, list) else ():
        if not isinstance(item, dict):
            raise ValueError(f"{where}: a message that is no object: {str(item)[:60]!r}")
        role = item.get("role", item.get("from", ""))
        text = item.get("content", item.get("value", ""))
        if isinstance(text, list):  # parts of different kinds
            text = "".join(part.get("text") or "" for part in text if isinstance(part, dict))
        messages.append((_ROLES.get(str(role), str(role)), str(text)))
    if not messages:
        raise ValueError(f"{where}: no messages")
    return messages


def _video(content: Mapping[str, Any], where: str) -> str:
    """Returns the path of the only video."""
    given = content.get("videos", content.get("video"))
    videos = given if isinstance(given, list) else [given] if given else []
    if len(videos) != 1 or not isinstance(videos[0], str) or not videos[0].strip():
        raise ValueError(f"{where}: one clip is wanted in 'videos', got {str(given)[:80]}")
    return videos[0].strip()
