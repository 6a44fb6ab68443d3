"""Renders prompts and encodes texts with any chat template.

To find the tokens before and after the words of user and assistant, the template is rendered around a sentinel; no
particular template is assumed.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vidreason.datamodules.types import Example, Prompt, Text, TextBatch
from vidreason.rewards.completion import THINK_CLOSE, THINK_OPEN, answer_start

SENTINEL = "VIDREASONSENTINEL"
_OPEN_REASONING = re.compile(rf"{re.escape(THINK_OPEN)}\s*\Z")


@dataclass(frozen=True)
class ChatFrame:
    """The tokens of a chat template around the words of user and assistant."""

    turn_end: str
    """Closes the user's turn and opens the assistant's."""
    lead: str
    """Stands before the assistant's first word (a space in some families, or the end of an empty reasoning); the model
    samples it too."""
    end_of_turn: tuple[int, ...]
    """Tokens that end the assistant's turn; the last one is a stop token."""
    reasoning_start: str = ""
    """Opening tag of the reasoning, if the generation prompt ends with it. It is part of every completion's text, but
    not of its tokens."""

    def words(self, text: str) -> str:
        """Returns what follows the prompt for an assistant's ``text``, without the end of the turn."""
        if self.reasoning_start and text.startswith(THINK_OPEN):
            return text.removeprefix(THINK_OPEN).lstrip()
        return self.lead + text


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    counts: list[bool]
    answers: list[bool]
    owner: int
    parent: int


def render(processor: Any, text: str, options: Mapping[str, Any], assistant: str | None = None) -> str:
    """Returns the conversation as a string: a user turn that starts with the video, then the assistant's turn.

    Args:
        processor: A processor with a chat template.
        text: Words of the user.
        options: Arguments of the chat template (``vlm.chat_template_kwargs``).
        assistant: Words of the assistant; None ends with the generation prompt.
    """
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}]
    if assistant is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": assistant}]})
    rendered: str = processor.apply_chat_template(
        messages, add_generation_prompt=assistant is None, tokenize=False, **options
    )
    return rendered


def tokens(processor: Any, text: str) -> list[int]:
    """Returns the token ids of a part of the template, without tokens that the tokenizer would add."""
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _spelt(processor: Any, words: str) -> Any:
    """Encodes a text, with special tokens in it as plain characters, so that no text can close its turn."""
    return processor.tokenizer(words, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)


def chat_frame(
    processor: Any, stop_ids: Collection[int], end_of_turn: str | None, options: Mapping[str, Any]
) -> ChatFrame:
    """Returns the tokens of the processor's chat template around the words of user and assistant.

    The assistant's words always follow the generation prompt, which is what the model sees when it is asked, also if
    the template renders a finished turn without a reasoning block that the generation prompt opens or inserts empty, or
    with other white space.

    Args:
        processor: A processor with a chat template.
        stop_ids: Stop tokens of the model's generation config and tokenizer.
        end_of_turn: What ends the assistant's turn; None reads it from the template.
        options: Arguments of the chat template.

    Raises:
        ValueError: If the template begins an assistant's turn differently from the generation prompt, or no token ends
            the turn.
    """
    # Two sentinels for the assistant tell its words from the user's.
    opened = render(processor, SENTINEL, options)
    whole = render(processor, SENTINEL, options, assistant=SENTINEL * 2)
    before, _, after = whole.partition(SENTINEL * 2)
    longer, shorter = "".join(opened.split()), "".join(before.split())
    if opened.count(SENTINEL) != 1 or not (before.startswith(opened) or longer.startswith(shorter)):
        raise ValueError(
            "the chat template renders an assistant's turn differently from the generation prompt that opens it: "
            f"{opened!r} is not the beginning of {whole!r}; give the model folder a template where it is"
        )
    lead = before[len(opened) :] if before.startswith(opened) else ""
    reasoning = _OPEN_REASONING.search(opened)
    if reasoning is not None and THINK_CLOSE not in lead:
        lead = f"\n{THINK_CLOSE}\n\n{lead}"  # A text without reasoning has to close the block before it begins.
    start = "" if reasoning is None else reasoning.group()
    end = _end_of_turn(processor, after, stop_ids) if end_of_turn is None else tuple(tokens(processor, end_of_turn))
    return ChatFrame(opened.partition(SENTINEL)[2], lead, end, start)


def _end_of_turn(processor: Any, after: str, stop_ids: Collection[int]) -> tuple[int, ...]:
    """Returns the tokens from the assistant's last word to its stop token.

    Some templates end a turn without a token, since the next role's name follows; the end of text ends it then.
    """
    ids = tokens(processor, after)
    for ends in (stop_ids, processor.tokenizer.all_special_ids):
        if found := [i for i, token in enumerate(ids) if token in ends]:
            return tuple(ids[: found[0] + 1])
    if processor.tokenizer.eos_token_id is None:
        raise ValueError(
            f"the chat template ends an assistant's turn with {after!r}, which holds no stop token, and the tokenizer "
            "has no eos_token: set one of the two in the model folder"
        )
    return (int(processor.tokenizer.eos_token_id),)


def prompt_text(processor: Any, prompt: Prompt, options: Mapping[str, Any]) -> str:
    """Returns the rendered prompt: through the opening of the assistant's turn or, if open, the user's last word."""
    if not prompt.open:
        return render(processor, prompt.text, options)
    return render(processor, prompt.text + SENTINEL, options).partition(SENTINEL)[0]


def encode_texts(processor: Any, frame: ChatFrame, examples: Sequence[Example], banned: frozenset[int]) -> TextBatch:
    """Returns the texts of all examples as one right-padded TextBatch.

    Raises:
        ValueError: If a text cannot follow its parent (a context after a closed prompt, anything after an answer), is
            empty, or contains a placeholder token such as the video's.
    """
    rows: list[_Row] = []
    for owner, example in enumerate(examples):
        offset = len(rows)
        for number, text in enumerate(example.texts):
            where = f"{example.sample.video_id}: text {number} ({text.text[:40]!r})"
            _check_place(where, example, text, number)
            row = _encode_text(processor, frame, example, number, owner, offset)
            if not row.ids:
                raise ValueError(f"{where} is empty: leave it out")
            if found := banned.intersection(row.ids):
                names = processor.tokenizer.convert_ids_to_tokens(sorted(found))
                raise ValueError(f"{where} holds the placeholder token {names[0]}: remove it from the text")
            rows.append(row)
    length = max((len(row.ids) for row in rows), default=0)
    pad = pad_id(processor)

    def padded(values: Sequence[Sequence[int | bool]], fill: int, dtype: torch.dtype) -> torch.Tensor:
        table = [[*value, *[fill] * (length - len(value))] for value in values]
        return torch.tensor(table, dtype=dtype).reshape(len(rows), length)

    return TextBatch(
        ids=padded([row.ids for row in rows], pad, torch.long),
        mask=padded([[True] * len(row.ids) for row in rows], 0, torch.bool),
        loss_mask=padded([row.counts for row in rows], 0, torch.bool),
        answer_mask=padded([row.answers for row in rows], 0, torch.bool),
        owner=torch.tensor([row.owner for row in rows], dtype=torch.long),
        parent=torch.tensor([row.parent for row in rows], dtype=torch.long),
    )


def pad_id(processor: Any) -> int:
    """Returns the id of the padding token, or of the end token if the tokenizer has no padding token."""
    tokenizer = processor.tokenizer
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def decode(processor: Any, ids: Sequence[int]) -> str:
    """Decodes tokens, including special tokens."""
    text: str = processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def answer_tokens(processor: Any, ids: Sequence[int]) -> torch.Tensor:
    """Returns [L] bool, True from ``<answer>`` to the end of the sampled tokens; all False without an answer."""
    mask = torch.zeros(len(ids), dtype=torch.bool)
    start = answer_start(decode(processor, ids))
    # From the first token that ends behind the tag's first character. The decoded text grows with the number of tokens,
    # so that bisection needs log L decodings instead of L.
    if start is not None:
        mask[bisect_right(range(len(ids)), start, key=lambda last: len(decode(processor, ids[: last + 1]))) :] = True
    return mask


def _check_place(where: str, example: Example, text: Text, number: int) -> None:
    if not -1 <= text.parent < number:
        raise ValueError(f"{where}: parent {text.parent} must be an earlier text of the same clip, or -1")
    behind_answer = text.parent >= 0 and example.texts[text.parent].role == "assistant"
    if behind_answer:
        raise ValueError(f"{where} continues text {text.parent}, where the assistant's turn has ended")
    if text.role == "context" and not example.prompt.open:
        raise ValueError(f"{where}: a context text needs an open prompt (Prompt(open=True))")
    if text.role == "draft" and (example.prompt.open or text.parent >= 0):
        raise ValueError(f"{where}: a draft starts the assistant's turn, so that it follows a closed prompt")


def _encode_text(processor: Any, frame: ChatFrame, example: Example, number: int, owner: int, offset: int) -> _Row:
    text, opened = example.texts[number], example.prompt.open
    parent = text.parent + offset if text.parent >= 0 else -1
    if text.role == "context":
        ids = _spelt(processor, text.text)["input_ids"]
        return _Row(ids, [False] * len(ids), [False] * len(ids), owner, parent)
    if text.role == "draft":
        behind = next((other.text for other in example.texts if other.parent == number), "")
        ids, _ = _split_draft(processor, frame, text.text, behind)
        return _Row(ids, [False] * len(ids), [False] * len(ids), owner, parent)
    if parent >= 0 and example.texts[text.parent].role == "draft":
        ids = [*_split_draft(processor, frame, example.texts[text.parent].text, text.text)[1], *frame.end_of_turn]
        return _Row(ids, [True] * len(ids), [True] * len(ids), owner, parent)
    words = frame.words(text.text)
    encoded = _spelt(processor, words)
    start = answer_start(words)
    first = len(words) if start is None else start
    # A token that straddles the tag's first character belongs to the answer, as in ``answer_tokens``.
    answers = [end > first for _, end in encoded["offset_mapping"]] + [start is not None] * len(frame.end_of_turn)
    head = tokens(processor, frame.turn_end) if opened else []
    ids = [*encoded["input_ids"], *frame.end_of_turn]
    counts = answers if text.learnt == "answer" else [True] * len(ids)
    return _Row([*head, *ids], [False] * len(head) + counts, [False] * len(head) + answers, owner, parent)


def _split_draft(processor: Any, frame: ChatFrame, draft: str, behind: str) -> tuple[list[int], list[int]]:
    """Returns the tokens of a draft, and those of the words behind it, as the model would write both together.

    A token that straddles the border, as ``><`` may, belongs to the words behind it.
    """
    words = frame.words(draft)
    encoded = _spelt(processor, words + behind)
    first = sum(end <= len(words) for _, end in encoded["offset_mapping"])
    return encoded["input_ids"][:first], encoded["input_ids"][first:]
