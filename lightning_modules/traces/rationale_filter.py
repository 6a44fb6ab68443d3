"""Rules that reject rationales of the model before it learns from them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vidreason.rewards.completion import find_markup, match_label, parse_completion

_HINT_MENTIONED = re.compile(
    r"\b(?:given|provided|stated|supplied|known|true|correct|ground[- ]truth) (?:label|class|category|answer)\b"
    r"|\b(?:label|class|category|answer) (?:is |was )?(?:given|provided|stated|supplied|known)\b"
    r"|\bas (?:labell?ed|classified|given)\b|\bwe (?:are|were) told\b|\bI (?:am|was) told\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class RationaleFilter:
    """Rules that reject a rationale; rejected rationales stay in the trace file with the reason.

    A rationale with a tag of the grammar or a special token is always rejected, since it cannot be part of a target.

    Args:
        min_words: Smallest number of words; an empty rationale is always rejected.
        max_words: Largest number of words; null is unlimited.
        agree: Reject a text whose answer is not the clip's label.
        complete: Reject a text that was truncated at ``max_new_tokens``; it would teach the model to stop mid-sentence.
        hides_hint: Reject a text written with ``label_hint`` that mentions that the label was given.
    """

    min_words: int = 1
    max_words: int | None = None
    agree: bool = True
    complete: bool = True
    hides_hint: bool = True

    def reject_reason(
        self, text: str, label: str | None, label_names: tuple[str, ...], label_hint: bool = False, cut: bool = False
    ) -> str | None:
        """Returns why ``text`` is rejected, or None if it is kept.

        Args:
            text: The completion.
            label: The clip's label, or None.
            label_names: All class names.
            label_hint: Whether the prompt contained the label.
            cut: Whether the completion was truncated at ``max_new_tokens``.

        Example:
            >>> RationaleFilter(min_words=3).reject_reason("A dog.", "walk", ("walk", "run"))
            'too short: 2 words'
            >>> RationaleFilter().reject_reason("Legs alternate.", "walk", ("walk", "run")) is None
            True
        """
        parsed = parse_completion(text)
        rationale = parsed.reasoning if parsed.reasoning is not None else text
        words = len(rationale.split())
        if words == 0:
            return "empty"
        if words < self.min_words:
            return f"too short: {words} words"
        if self.max_words is not None and words > self.max_words:
            return f"too long: {words} words"
        if (markup := find_markup(rationale.strip())) is not None:
            return f"contains {markup!r}, which cannot be part of a trace"
        if cut and self.complete:
            return "cut at max_new_tokens"
        if label_hint and self.hides_hint and _HINT_MENTIONED.search(rationale):
            return "mentions having been given the label"
        if self.agree and label is not None and parsed.answer is not None:
            answer = match_label(parsed.answer, label_names)
            if answer != label:
                return f"answers {parsed.answer!r}, the label is {label!r}"
        return None
