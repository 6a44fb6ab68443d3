"""The grammar of a completion, ``<think>…</think><answer>…</answer>``: written and read in this file only.

A form may leave the reasoning out, put the answer first, or ask for ``<confidence>…</confidence>`` at the end.

Tags are plain text to the tokenizer, never special tokens: decoding may drop special tokens, and every reward would
then be 0. Reading is linear in the length of the text, whatever the text is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"
CONFIDENCE_OPEN = "<confidence>"
CONFIDENCE_CLOSE = "</confidence>"

CompletionMode = Literal["think", "no_think", "answer_first"]

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
_MARKUP = re.compile(r"<[^<>\s]+>|<\s*(?:/\s*)?(?:think|answer|confidence)\s*>", re.IGNORECASE)
_DECIMAL = re.compile(r"\d+(?:\.\d*)?|\.\d+", re.ASCII)

_THINK = (THINK_OPEN, THINK_CLOSE)
_ANSWER = (ANSWER_OPEN, ANSWER_CLOSE)
_CONFIDENCE = (CONFIDENCE_OPEN, CONFIDENCE_CLOSE)


@dataclass(frozen=True)
class CompletionForm:
    """Which blocks a well-formed completion has.

    Args:
        mode: ``think`` reasons, then answers; ``no_think`` only answers; ``answer_first`` answers, then says why.
        confidence: Whether a confidence between 0 and 1 stands at the end.
    """

    mode: CompletionMode = "think"
    confidence: bool = False

    @property
    def blocks(self) -> tuple[tuple[str, str], ...]:
        """Opening and closing tags in their order."""
        order = {"think": (_THINK, _ANSWER), "no_think": (_ANSWER,), "answer_first": (_ANSWER, _THINK)}[self.mode]
        return (*order, _CONFIDENCE) if self.confidence else order


THINK_FORM = CompletionForm()


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
    """True iff the whole text is the blocks of its form in their order (one think block, then one answer block), and
    none holds a tag or a special token. White space may stand around the blocks, end tokens behind them."""
    confidence: float | None = None
    """Number in the first ``<confidence>…</confidence>``; None without one, or where it is not between 0 and 1."""


def parse_completion(text: str, form: CompletionForm = THINK_FORM) -> ParsedCompletion:
    """Takes a completion apart; never fails, whatever the text is.

    Args:
        text: A decoded completion.
        form: What the completion should look like.

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
        well_formed=_is_well_formed(text, form),
        confidence=_number(_first_block(text, *_CONFIDENCE)),
    )


def render_completion(
    reasoning: str, answer: str, form: CompletionForm = THINK_FORM, confidence: float | None = None
) -> str:
    """Writes a well-formed completion.

    Args:
        reasoning: What stands between the think tags; may be empty, and is left out where the form has none.
        answer: The label.
        form: Which blocks, in which order.
        confidence: Between 0 and 1, where the form has one.

    Returns:
        ``<think>reasoning</think><answer>answer</answer>``, both stripped; ``parse_completion`` gives them back.

    Raises:
        ValueError: The answer is empty, either holds a tag or a special token, or the confidence is not what the form
            asks for.

    Example:
        >>> render_completion("A dog passes.", "normal")
        '<think>A dog passes.</think><answer>normal</answer>'
    """
    if not answer.strip():
        raise ValueError("the answer of a completion is empty: give it the clip's label")
    for name, content in (("reasoning", "" if form.mode == "no_think" else reasoning), ("answer", answer)):
        markup = find_markup(content)
        if markup is not None:
            raise ValueError(
                f"the {name} holds {markup!r}, a tag or special token that may not stand inside a block: "
                f"remove it or reject the text ({content[:80]!r})"
            )
    if form.confidence != (confidence is not None) or not 0 <= (confidence or 0.0) <= 1:
        wanted = "a confidence between 0 and 1" if form.confidence else "no confidence"
        raise ValueError(f"the form {form} has {wanted}, got {confidence}")
    contents = {
        _THINK: reasoning.strip(),
        _ANSWER: answer.strip(),
        _CONFIDENCE: f"{confidence:.2f}" if confidence is not None else "",
    }
    return "".join(f"{opening}{contents[opening, closing]}{closing}" for opening, closing in form.blocks)


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


def _number(block: str | None) -> float | None:
    if block is None or not _DECIMAL.fullmatch(block.strip()):
        return None
    value = float(block)
    return value if value <= 1 else None


def _is_well_formed(text: str, form: CompletionForm) -> bool:
    rest = text
    for opening, closing in form.blocks:
        rest = rest.lstrip()
        end = rest.find(closing)
        if not rest.startswith(opening) or end < 0 or find_markup(content := rest[len(opening) : end]) is not None:
            return False
        if opening == CONFIDENCE_OPEN and _number(content) is None:
            return False
        rest = rest[end + len(closing) :]
    return _TRAILER.fullmatch(rest) is not None
