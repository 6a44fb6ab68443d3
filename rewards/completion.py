"""The grammar of a completion, ``<think>…</think><answer>…</answer>``: written and read in this file only.

Tags are plain text to the tokenizer, never special tokens: decoding may drop special tokens, and every reward would
then be 0. Reading is linear in the length of the text, whatever the text is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"

# What a decoder may leave behind a finished turn. Decoded completions come without it; a teacher's file may hold it.
_END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<eos>",
    "</s>",
)
_TRAILER = re.compile(rf"(?:\s|{'|'.join(map(re.escape, _END_TOKENS))})*")

# Every family has its own special tokens (<|video_pad|>, <image>, <IMG_CONTEXT>, <row_1_col_2>, </s>): all of them are
# one word in angle brackets, and no list of names would stay complete. The second form catches "< Think >".
_MARKUP = re.compile(r"<[^<>\s]+>|<\s*(?:/\s*)?(?:think|answer)\s*>", re.IGNORECASE)


@dataclass(frozen=True)
class ParsedCompletion:
    """A completion taken apart."""

    text: str
    """The completion as it was given."""
    reasoning: str | None
    """Stripped content of the first ``<think>…</think>``; None without one."""
    answer: str | None
    """Stripped content of the first ``<answer>…</answer>``; None without one."""
    well_formed: bool
    """True iff the whole text is one think block, then one answer block, and neither holds a tag or a special token.
    White space may stand around the blocks, end tokens behind them."""


def parse_completion(text: str) -> ParsedCompletion:
    """Takes a completion apart; never fails, whatever the text is.

    Args:
        text: A decoded completion.

    Returns:
        The first blocks, and whether the whole text follows the grammar. The answer of a malformed text is still read.

    Example:
        >>> parse_completion("<think>A dog.</think> <answer> Normal </answer>").answer
        'Normal'
        >>> parse_completion("Normal").answer is None
        True
    """
    reasoning = _first_block(text, THINK_OPEN, THINK_CLOSE)
    answer = _first_block(text, ANSWER_OPEN, ANSWER_CLOSE)
    return ParsedCompletion(
        text=text,
        reasoning=None if reasoning is None else reasoning.strip(),
        answer=None if answer is None else answer.strip(),
        well_formed=_is_well_formed(text),
    )


def render_completion(reasoning: str, answer: str) -> str:
    """Writes a well-formed completion.

    Args:
        reasoning: What stands between the think tags; may be empty.
        answer: The label.

    Returns:
        ``<think>reasoning</think><answer>answer</answer>``, both stripped; ``parse_completion`` gives them back.

    Raises:
        ValueError: The answer is empty, or either holds a tag or a special token.

    Example:
        >>> render_completion("A dog passes.", "normal")
        '<think>A dog passes.</think><answer>normal</answer>'
    """
    if not answer.strip():
        raise ValueError("the answer of a completion is empty: give it the clip's label")
    for name, content in (("reasoning", reasoning), ("answer", answer)):
        markup = find_markup(content)
        if markup is not None:
            raise ValueError(
                f"the {name} holds {markup!r}, a tag or special token that may not stand inside a block: "
                f"remove it or reject the text ({content[:80]!r})"
            )
    return f"{THINK_OPEN}{reasoning.strip()}{THINK_CLOSE}{ANSWER_OPEN}{answer.strip()}{ANSWER_CLOSE}"


def find_markup(text: str) -> str | None:
    """Returns the first tag or special token in a text, None where it has none; such a text cannot be rendered."""
    match = _MARKUP.search(text)
    return None if match is None else match.group()


def answer_start(text: str) -> int | None:
    """Returns the character offset of the first ``<answer>``, None where there is none."""
    offset = text.find(ANSWER_OPEN)
    return None if offset < 0 else offset


def same_label(answer: str | None, label: str) -> bool:
    """Whether an answer names this label: equality of the stripped, case-folded texts; None names nothing."""
    return answer is not None and answer.strip().casefold() == label.strip().casefold()


def match_label(answer: str | None, label_names: Sequence[str]) -> str | None:
    """Returns the label that an answer names, in the spelling of ``label_names``; None where it names none."""
    return next((name for name in label_names if same_label(answer, name)), None)


def _first_block(text: str, opening: str, closing: str) -> str | None:
    start = text.find(opening)
    if start < 0:
        return None
    start += len(opening)
    end = text.find(closing, start)
    return None if end < 0 else text[start:end]


def _is_well_formed(text: str) -> bool:
    body = text.lstrip()
    think_end = body.find(THINK_CLOSE)
    if not body.startswith(THINK_OPEN) or think_end < 0:
        return False
    tail = body[think_end + len(THINK_CLOSE) :].lstrip()
    answer_end = tail.find(ANSWER_CLOSE)
    if not tail.startswith(ANSWER_OPEN) or answer_end < 0:
        return False
    reasoning = body[len(THINK_OPEN) : think_end]
    answer = tail[len(ANSWER_OPEN) : answer_end]
    trailer = tail[answer_end + len(ANSWER_CLOSE) :]
    return find_markup(reasoning) is None and find_markup(answer) is None and _TRAILER.fullmatch(trailer) is not None
