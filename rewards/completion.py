"""The grammar of a completion, ``<think>…</think><answer>…</answer>``; only this file writes and parses it.

A form may omit the reasoning, put the answer first, or ask for ``<confidence>…</confidence>`` at the end.

Tags are plain text to the tokenizer, never special tokens: decoding may drop special tokens, and every reward would
then be 0. Parsing takes time linear in the length of the text.
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

# End tokens that decoding may leave after a finished turn. Our completions have none; the file of a teacher may.
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
MARKUP = re.compile(r"<[^<>\s]+>|<\s*(?:/\s*)?(?:think|answer|confidence)\s*>", re.IGNORECASE)
"""Tags and special tokens."""
# Stricter than float(), which also takes signs, exponents, nan, inf, underscores and other scripts' digits.
_DECIMAL = re.compile(r"\d+(?:\.\d*)?|\.\d+", re.ASCII)

_THINK = (THINK_OPEN, THINK_CLOSE)
_ANSWER = (ANSWER_OPEN, ANSWER_CLOSE)
_CONFIDENCE = (CONFIDENCE_OPEN, CONFIDENCE_CLOSE)


@dataclass(frozen=True)
class CompletionForm:
    """The blocks of a well-formed completion.

    Args:
        mode: ``think`` reasons, then answers; ``no_think`` only answers; ``answer_first`` answers, then gives reasons.
        confidence: Whether a confidence between 0 and 1 follows at the end.
    """

    mode: CompletionMode = "think"
    confidence: bool = False

    @property
    def blocks(self) -> tuple[tuple[str, str], ...]:
        """(Opening tag, closing tag) of every block, in order."""
        order = {"think": (_THINK, _ANSWER), "no_think": (_ANSWER,), "answer_first": (_ANSWER, _THINK)}[self.mode]
        return (*order, _CONFIDENCE) if self.confidence else order


THINK_FORM = CompletionForm()


@dataclass(frozen=True)
class ParsedCompletion:
    """The parts of a completion."""

    text: str
    """The completion as it was given."""
    reasoning: str | None
    """Stripped content of the first ``<think>…</think>``; None if there is none."""
    answer: str | None
    """Stripped content of the first ``<answer>…</answer>``; None if there is none."""
    well_formed: bool
    """True if the whole text consists of the blocks of its form in order, and none contains a tag or a special token.
    White space may surround the blocks, and end tokens may follow the last one."""
    confidence: float | None = None
    """Number in the first ``<confidence>…</confidence>``; None if there is none or it is not between 0 and 1."""


def parse_completion(text: str, form: CompletionForm = THINK_FORM) -> ParsedCompletion:
    """Parses a completion; malformed text never raises an error.

    Args:
        text: A decoded completion.
        form: The blocks that a well-formed completion has.

    Returns:
        The first blocks, and whether the whole text follows the grammar. Malformed text may still have an answer.

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


def render_reasoning(text: str) -> str:
    """Renders the beginning of a completion up to its answer: ``<think>reasoning</think>``.

    Args:
        text: A completion; without a think block, all before its answer is the reasoning. Tags and special tokens are
            left out.

    Example:
        >>> render_reasoning("<think> A dog. </think><answer>normal</answer>")
        '<think>A dog.</think>'
        >>> render_reasoning("<think>A dog pas")
        '<think>A dog pas</think>'
        >>> render_reasoning("A dog.<answer>normal</answer>")
        '<think>A dog.</think>'
    """
    reasoning = parse_completion(text).reasoning
    before = (text if reasoning is None else reasoning).partition(ANSWER_OPEN)[0]
    return f"{THINK_OPEN}{MARKUP.sub('', before).strip()}{THINK_CLOSE}"


def render_completion(
    reasoning: str, answer: str, form: CompletionForm = THINK_FORM, confidence: float | None = None
) -> str:
    """Renders a well-formed completion.

    Args:
        reasoning: Content of the think block; may be empty, and is ignored if the form has no such block.
        answer: The label.
        form: The blocks and their order.
        confidence: Between 0 and 1 if the form has a confidence, else None.

    Returns:
        ``<think>reasoning</think><answer>answer</answer>``, both stripped; ``parse_completion`` is the inverse.

    Raises:
        ValueError: If the answer is empty, a text contains a tag or a special token, or the confidence does not fit
            the form.

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
    # `0 <= x <= 1` is false for NaN, too
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
    """Returns the first tag or special token in a text, or None; a text with one cannot be rendered."""
    match = MARKUP.search(text)
    return None if match is None else match.group()


def answer_start(text: str) -> int | None:
    """Returns the character offset of the first ``<answer>``, or None if there is none."""
    offset = text.find(ANSWER_OPEN)
    return None if offset < 0 else offset


def same_label(answer: str | None, label: str) -> bool:
    """Returns whether an answer equals a label once both are stripped and case-folded; False for None."""
    return answer is not None and answer.strip().casefold() == label.strip().casefold()


def match_label(answer: str | None, label_names: Sequence[str]) -> str | None:
    """Returns the label that an answer names, in the spelling of ``label_names``, or None."""
    return next((name for name in label_names if same_label(answer, name)), None)


def _first_block(text: str, opening: str, closing: str) -> str | None:
    # str.find, because a lazy regular expression takes quadratic time on text that repeats the opening tag
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
    return value if value <= 1 else None  # never negative: _DECIMAL has no sign


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
