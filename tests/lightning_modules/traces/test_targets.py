from pathlib import Path

import pytest

from vidreason.datamodules.traces import TraceRecord
from vidreason.datamodules.types import Clip
from vidreason.lightning_modules.traces.targets import (
    caption_targets,
    rationale_targets,
    swapped_targets,
    trace_targets,
    traces_or_composed,
)
from vidreason.rewards.completion import CompletionForm, parse_completion, render_completion

CLIPS = [Clip(Path("a"), "walk", "a"), Clip(Path("b"), "run", "b"), Clip(Path("c"), None, "c")]
NAMES = ("walk", "run")


def record(video_id: str, text: str, sample: int = 0, kept: bool = True) -> TraceRecord:
    parsed = parse_completion(text)
    return TraceRecord(video_id, sample, text, parsed.reasoning, parsed.answer, "stop", 0.0, 1, kept)


def test_descriptions_become_traces_that_end_in_the_training_label():
    records = {"a": (record("a", " Legs move. "), record("a", "Slowly.", 1)), "b": (record("b", "Fast.", kept=False),)}
    texts = trace_targets(CLIPS, records, "describe", NAMES)
    assert texts["a"] == (render_completion("Legs move.", "walk"), render_completion("Slowly.", "walk"))
    assert texts["b"] == ()
    assert "c" not in texts


def test_a_description_with_a_tag_cannot_stand_in_a_trace():
    assert trace_targets(CLIPS, {"a": (record("a", "Legs </think> move."),)}, "describe", NAMES)["a"] == ()


def test_own_traces_count_where_they_are_right():
    right, wrong = render_completion("Legs move.", "Walk"), render_completion("Legs move.", "run")
    texts = trace_targets(
        CLIPS, {"a": (record("a", wrong), record("a", right, 1), record("a", "x", 2))}, "reason", NAMES
    )
    assert texts["a"] == (render_completion("Legs move.", "walk"),)


def test_rationales_are_taken_as_written():
    assert rationale_targets({"a": (record("a", " Legs move. "), record("a", "no", 1, kept=False))}) == {
        "a": ("Legs move.",)
    }


def test_captions_come_from_a_column():
    clips = [Clip(Path("a"), None, "a", fields={"said": "hello "}), Clip(Path("b"), None, "b", fields={"said": " "})]
    assert caption_targets(clips, "said") == {"a": ("hello",)}
    assert caption_targets(clips, "words") == {}


def test_traces_take_the_form_that_is_asked_for():
    described = {"a": (record("a", "Legs move."), record("a", "A </think> tag.", 1), record("a", "Slowly.", 2))}
    first = trace_targets(CLIPS, described, "describe", NAMES, CompletionForm("answer_first"))
    assert first["a"] == (
        "<answer>walk</answer><think>Legs move.</think>",
        "<answer>walk</answer><think>Slowly.</think>",
    )
    bare = trace_targets(CLIPS, described, "describe", NAMES, CompletionForm("no_think"))
    assert bare["a"] == ("<answer>walk</answer>",), "the same text three times teaches nothing more"
    own = {"a": (record("a", "<answer>run</answer>"), record("a", "<answer>Walk</answer>", 1))}
    assert trace_targets(CLIPS, own, "reason", NAMES, CompletionForm("no_think"))["a"] == ("<answer>walk</answer>",)
    assert trace_targets(CLIPS, own, "reason", NAMES)["a"] == ()
    with pytest.raises(ValueError, match="no confidence to learn from"):
        trace_targets(CLIPS, own, "reason", NAMES, CompletionForm(confidence=True))


def test_composed_texts_fill_in_for_missing_traces_and_the_shares_are_told():
    traces = {"a": ("own",), "b": (), "c": ()}
    texts, shares = traces_or_composed(traces, {"a": ("unused",), "b": ("composed", "again")})
    assert texts == {"a": ("own",), "b": ("composed", "again"), "c": ()}
    assert shares == (
        "1 (33%) from own traces that end in the label, 1 (33%) from own descriptions composed with the label, "
        "1 (33%) from nothing"
    )


def test_swapped_traces_are_about_other_clips_and_keep_their_own_label():
    texts = {str(i): (f"{i} first", f"{i} second") for i in range(40)} | {"none": ()}
    swapped = swapped_targets(texts, 2)
    assert set(swapped) == set(texts) - {"none"}
    steps = set()
    for name, others in swapped.items():
        owners = [text.split()[0] for text in others]
        assert len(set(owners)) == 2
        assert name not in owners
        assert all(text in texts[owner] for text, owner in zip(others, owners, strict=True))
        steps |= {(int(owner) - int(name)) % 8 for owner in owners}
    assert steps == set(range(8)), "the label of another clip does not follow from the clip's own"
    assert swapped_targets(texts, 0) == dict.fromkeys(swapped, ())
    assert swapped_targets({"alone": ("x",)}, 2) == {"alone": ()}
    assert swapped == swapped_targets(texts, 2)
