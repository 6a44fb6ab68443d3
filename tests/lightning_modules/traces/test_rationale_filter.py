import pytest

from vidreason.lightning_modules.traces.rationale_filter import RationaleFilter
from vidreason.rewards.completion import render_completion

NAMES = ("walk", "run")


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("", {}, "empty"),
        ("  \n", {}, "empty"),
        ("two words", {"min_words": 3}, "too short"),
        ("now three words", {"max_words": 2}, "too long"),
        ("it ends </think> early", {}, "contains '</think>'"),
        (render_completion("Both feet leave the ground.", "run"), {}, "answers 'run'"),
        (render_completion("Both feet leave the ground.", "fly"), {}, "answers 'fly'"),
    ],
)
def test_rejections(text, options, reason):
    assert RationaleFilter(**options).reject_reason(text, "walk", NAMES).startswith(reason)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("One foot stays on the ground.", {}),
        (render_completion("One foot stays on the ground.", "Walk"), {}),
        (render_completion("Both feet leave the ground.", "run"), {"agree": False}),
    ],
)
def test_kept(text, options):
    assert RationaleFilter(**options).reject_reason(text, "walk", NAMES) is None


@pytest.mark.parametrize(
    "text", ["The given label is walk.", "As stated, the correct answer is walk.", "We were told that he walks."]
)
def test_talk_of_the_hint_is_rejected_only_where_there_was_one(text):
    assert "given the label" in RationaleFilter().reject_reason(text, "walk", NAMES, label_hint=True)
    assert RationaleFilter().reject_reason(text, "walk", NAMES) is None
    assert RationaleFilter(hides_hint=False).reject_reason(text, "walk", NAMES, label_hint=True) is None


def test_words_are_counted_in_the_reasoning_alone():
    assert (
        RationaleFilter(min_words=3)
        .reject_reason(render_completion("so", "walk"), "walk", NAMES)
        .startswith("too short")
    )


def test_a_text_that_was_cut_is_rejected():
    assert RationaleFilter().reject_reason("One foot stays on", "walk", NAMES, cut=True) == "cut at max_new_tokens"
    assert RationaleFilter(complete=False).reject_reason("One foot stays on", "walk", NAMES, cut=True) is None
