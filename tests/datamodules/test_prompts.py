from dataclasses import replace
from pathlib import Path

import pytest

from vidreason.datamodules.prompts import DescribeView, LabelScoringView, LabelView, ReasonView, ReviewView
from vidreason.datamodules.task import ClassSpec, Task
from vidreason.datamodules.types import Clip, Text
from vidreason.rewards.completion import CompletionForm, render_completion

TASK = Task("door", "What happens?", (ClassSpec("theft", "a parcel is taken"), ClassSpec("visit", "someone knocks")))
CLIP = Clip(Path("a.mp4"), "visit", "a", fields={"note": "secret"})
OTHER = Clip(Path("b.mp4"), None, "b")


def test_prompts_hold_question_classes_and_nothing_of_the_label():
    for view in (DescribeView(TASK), ReasonView(TASK), LabelView(TASK), LabelScoringView(TASK), ReviewView(TASK, {})):
        text = view.prompt(CLIP).text
        assert text.startswith("What happens?")
        assert "- theft: a parcel is taken\n- visit: someone knocks" in text
        assert text == view.prompt(replace(CLIP, label="theft")).text
        assert "secret" not in text


def test_only_reason_explains_the_format():
    assert "<think>" in ReasonView(TASK).prompt(CLIP).text
    assert "<answer>" in ReasonView(TASK).prompt(CLIP).text
    assert "<" not in DescribeView(TASK).prompt(CLIP).text + LabelView(TASK).prompt(CLIP).text


def test_label_hint_shows_the_label_and_changes_the_hash():
    hinted = DescribeView(TASK, label_hint=True)
    assert "The right answer is: visit" in hinted.prompt(CLIP).text
    assert hinted.sha() != DescribeView(TASK).sha()
    with pytest.raises(ValueError, match="b .* has no label to show"):
        hinted.prompt(OTHER)


def test_targets_by_video():
    view = DescribeView(TASK, {"a": ("one", "two")})
    assert view.texts(CLIP) == (Text("one"), Text("two"))
    assert view.keep(CLIP)
    assert not view.keep(OTHER)
    assert ReasonView(TASK).keep(OTHER)
    assert ReasonView(TASK).texts(CLIP) == ()


def test_label_view():
    assert LabelView(TASK).texts(CLIP) == (Text("visit"),)
    assert LabelView(TASK, with_targets=False).texts(CLIP) == ()
    assert not LabelView(TASK).keep(OTHER)
    assert LabelScoringView(TASK).texts(OTHER) == (Text("theft"), Text("visit"))


def test_review_is_a_tree_of_traces_and_labels():
    traces = {"a": (render_completion("A man knocks.", "visit"), "gibberish")}
    view = ReviewView(TASK, traces)
    assert view.prompt(CLIP).open
    assert view.texts(CLIP) == (
        Text("\nAccount: A man knocks.\nConclusion: visit", "context", -1),
        Text("theft", parent=0),
        Text("visit", parent=0),
        Text("\nAccount: gibberish\nConclusion: none", "context", -1),
        Text("theft", parent=3),
        Text("visit", parent=3),
    )
    assert not view.keep(replace(OTHER, label="visit"))
    own = ReviewView(TASK, traces, labels="target").texts(CLIP)
    assert [text.text for text in own if text.role == "assistant"] == ["visit", "visit"]


def test_review_inputs():
    traces = {"a": ("x",)}
    video = ReviewView(TASK, traces, input="video")
    assert not video.prompt(CLIP).open
    assert video.texts(CLIP) == (Text("theft"), Text("visit"))
    assert video.keep(replace(OTHER, label="visit"))
    blind = ReviewView(TASK, traces, input="trace")
    assert (video.shows_video, blind.shows_video) == (True, False)
    assert blind.texts(CLIP) == ReviewView(TASK, traces).texts(CLIP)
    assert len({v.sha() for v in (video, blind, ReviewView(TASK, traces))}) == 3


def test_a_reviewer_may_go_on_from_the_reasoning():
    traces = {"a": (render_completion("A man knocks.", "visit"), "<think>cut off")}
    view = ReviewView(TASK, traces, input="video+reasoning")
    assert view.prompt(CLIP) == ReasonView(TASK).prompt(CLIP), "asked what the policy was asked"
    assert view.shows_video
    assert view.texts(CLIP) == (
        Text("<think>A man knocks.</think>", "draft", -1),
        Text("<answer>theft</answer>", parent=0),
        Text("<answer>visit</answer>", parent=0),
        Text("<think>cut off</think>", "draft", -1),
        Text("<answer>theft</answer>", parent=3),
        Text("<answer>visit</answer>", parent=3),
    )
    assert view.sha() != ReviewView(TASK, traces).sha()


@pytest.mark.parametrize(
    ("trace", "shown"),
    [
        ("<answer>visit</answer>", ""),
        ("A dog.<answer>visit</answer>", "A dog."),
        ("<think>A dog <answer>visit</answer>", "A dog"),
        ("<think>A dog <answer>visit</answer></think>", "A dog"),
    ],
)
def test_a_reviewer_that_goes_on_never_sees_the_conclusion(trace, shown):
    text = ReviewView(TASK, {"a": (trace,)}, input="video+reasoning").texts(CLIP)[0]
    assert text == Text(f"<think>{shown}</think>", "draft", -1)


def test_hash_follows_the_template_not_the_texts():
    changed = replace(TASK, prompts={"reason": "{question} Think."})
    assert ReasonView(TASK).sha() == ReasonView(TASK, {"a": ("x",)}).sha()
    assert ReasonView(changed).sha() != ReasonView(TASK).sha()
    assert DescribeView(changed).sha() == DescribeView(TASK).sha()
    assert ReasonView(TASK).sha() != DescribeView(TASK).sha()


def test_every_mode_asks_for_its_blocks():
    def asked(form):
        text = ReasonView(TASK, form=form).prompt(CLIP).text
        return [tag for tag in ("<think>", "<answer>", "<confidence>") if tag in text], text

    think, no_think, first = (CompletionForm(mode) for mode in ("think", "no_think", "answer_first"))
    assert asked(think)[0] == ["<think>", "<answer>"]
    assert asked(think)[1] == ReasonView(TASK).prompt(CLIP).text
    assert asked(no_think)[0] == ["<answer>"]
    blocks, text = asked(first)
    assert blocks == ["<think>", "<answer>"]
    assert text.index("<answer>") < text.index("<think>")
    assert asked(CompletionForm("no_think", confidence=True))[0] == ["<answer>", "<confidence>"]
    forms = [CompletionForm(mode, sure) for mode in ("think", "no_think", "answer_first") for sure in (False, True)]
    assert len({ReasonView(TASK, form=form).sha() for form in forms}) == 6


def test_a_task_may_word_every_mode():
    own = replace(TASK, prompts={"answer": "{question} One word in <answer></answer>."})
    form = CompletionForm("no_think")
    assert ReasonView(own, form=form).prompt(CLIP).text == "What happens? One word in <answer></answer>."
    assert ReasonView(own).sha() == ReasonView(TASK).sha()


def test_a_review_of_a_bare_answer_has_no_account():
    view = ReviewView(
        TASK, {"a": (render_completion("", "visit", CompletionForm("no_think")), "I saw <answer>visit</answer>")}
    )
    accounts = [text.text for text in view.texts(CLIP) if text.role == "context"]
    assert accounts[0] == "\nAccount: none\nConclusion: visit"
    assert accounts[1].startswith("\nAccount: I saw")


def test_of_a_swapped_completion_only_the_answer_is_learnt():
    own, other = render_completion("a parcel", "theft"), render_completion("a knock", "visit")
    view = ReasonView(TASK, {"a": (own,)}, swapped={"a": (other,)})
    assert view.texts(CLIP) == (Text(own), Text(other, learnt="answer"))
    assert not view.keep(OTHER)
