"""The texts of pretraining: what they say, and that no label occurs in them."""

import itertools
import re
from collections.abc import Iterator

import numpy as np
import pytest

from tools.pretraining.captions import question_and_answer_example
from tools.pretraining.stream import frame_targets, pretraining_scene
from tools.pretraining.texts import ECHO_QUESTION, FRAMES_QUESTION, SLOTS_QUESTION, echo, frame_by_frame, slots
from vidreason.datamodules.porch.texts import (
    DESCRIBE_QUESTION,
    FORBIDDEN_STEMS,
    PHRASES,
    RULES,
    describe,
    read_facts,
)
from vidreason.datamodules.porch.world import FACT_VALUES, LABELS, Facts, is_possible, stream

TEXTS = 10_000
POSSIBLE = [facts for values in itertools.product(*FACT_VALUES.values()) if is_possible(facts := Facts(*values))]
INFLECTIONS = [
    *("delivery", "deliver", "delivers", "delivered", "delivering", "deliverer", "theft", "thefts", "thief", "thieves"),
    *(
        "thieving",
        "steal",
        "steals",
        "stealing",
        "stole",
        "stolen",
        "visit",
        "visits",
        "visited",
        "visiting",
        "visitor",
    ),
    *("visitors", "entry", "entries", "entrance", "entrant", "enter", "enters", "entered", "entering", "loiter"),
    *("loiters", "loitered", "loitering", "loiterer", "lingering", "fall", "falls", "fell", "fallen", "falling"),
    *("tamper", "tampers", "tampered", "tampering", "pass", "passes", "passed", "passing", "passer", "passerby"),
    *("passersby", "normal", "normally", "abnormal", "abnormally"),
]


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def drawn_descriptions() -> Iterator[tuple[Facts, str]]:
    """As many descriptions as are asked for, over every possible combination of facts."""
    rng = np.random.Generator(np.random.PCG64(0))
    for number in range(TEXTS):
        facts = POSSIBLE[number % len(POSSIBLE)]
        yield facts, describe(facts, rng)


def test_pretraining_texts_know_no_label() -> None:
    """10,000 texts, every paraphrase, the other forms and the questions."""
    texts = [DESCRIBE_QUESTION, ECHO_QUESTION, FRAMES_QUESTION, SLOTS_QUESTION]
    texts += [phrase for values in PHRASES.values() for phrases in values.values() for phrase in phrases]
    texts += [text for _, text in drawn_descriptions()]
    texts += [slots(facts) for facts in POSSIBLE]
    texts += [frame_by_frame(pretraining_scene(0, index)) for index in range(60)]
    texts += [echo(stream(0, "pretrain", 0, index, "texts")) for index in range(1000)]
    for index in range(20):
        example = question_and_answer_example(0, index, slot_share=0.5, echo_share=0.5)
        texts += [example.prompt.text, *(text.text for text in example.texts)]
    assert len(texts) > TEXTS
    words = {word for text in texts for word in words_of(text)}
    assert len(words) > 80
    assert [word for word in words if word.startswith(FORBIDDEN_STEMS)] == []
    assert not words & set(INFLECTIONS)
    spaced = "\n".join(set(texts)).lower().replace("_", " ")
    assert [label for label in LABELS if label.replace("_", " ") in spaced] == []
    for rule in RULES.values():
        assert rule.lower() not in spaced


def test_pretraining_uses_each_question() -> None:
    asked = set()
    for index in range(20):
        context, frames, said, seen = question_and_answer_example(3, index, slot_share=0.5, echo_share=0.5).texts
        asked |= {context.text, frames.text.split(":")[0]}
        assert (context.role, frames.role, said.role, seen.role) == ("context", "context", "assistant", "assistant")
        assert (context.parent, frames.parent, said.parent, seen.parent) == (-1, -1, 0, 1)
        facts = pretraining_scene(3, index).facts
        assert said.text == slots(facts) if context.text == SLOTS_QUESTION else read_facts(said.text) == facts.as_dict()
        if frames.text == FRAMES_QUESTION:
            assert seen.text == frame_by_frame(pretraining_scene(3, index))
        else:
            assert frames.text == ECHO_QUESTION + seen.text
    assert asked == {SLOTS_QUESTION, DESCRIBE_QUESTION, FRAMES_QUESTION, ECHO_QUESTION.split(":")[0]}


def test_slots_tell_facts_apart() -> None:
    assert slots(Facts("at_door", "left", "door", "0", "upright", "right", "gone", "on")) == (
        "before: at door; from: left; at: door; turns: 0; posture: upright; to: right; after: gone; lamp: on"
    )
    assert len({slots(facts) for facts in POSSIBLE}) == len(POSSIBLE)


@pytest.mark.parametrize("index", range(12))
def test_frame_by_frame_says_what_is_there(index: int) -> None:
    scene = pretraining_scene(11, index)
    rows = dict(part.split(": ", 1) for part in frame_by_frame(scene).split("; "))
    truth = frame_targets(scene)
    assert list(rows) == ["person", "parcel", "body", "lamp"]
    for t in range(12):
        letters = {name: row.split()[t] for name, row in rows.items()}
        column = truth["person"][t]
        assert letters["person"] == ("-" if column == 12 else "abcdefghijkl"[column])
        if truth["at_door"][t]:
            assert letters["parcel"] == "p"
        elif truth["carried"][t]:
            assert letters["parcel"] == "h"
        assert letters["body"] == ("d" if truth["lying"][t] else "u")
        assert letters["lamp"] == ("y" if truth["lamp"][t] else "n")
    assert all(len(row.split()) == 12 for row in rows.values())


def test_echoes_are_random_text_with_every_sign() -> None:
    """Nothing about the video, so that they teach to write, and no words but those that descriptions use."""
    texts = [echo(stream(0, "pretrain", 0, index, "texts")) for index in range(600)]
    assert len(set(texts)) > 590
    written = set("".join(texts))
    assert set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_<>/!?\n ") <= written
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        assert any(tag in text for text in texts)
