"""The words of porch: what they say, what they never say, and that they can be read back."""

import itertools
import re
from collections.abc import Iterator

import numpy as np

from vidreason.datamodules.porch.scene import draw_scene
from vidreason.datamodules.porch.texts import (
    FORBIDDEN_STEMS,
    PHRASES,
    RULES,
    describe,
    rationale,
    read_facts,
)
from vidreason.datamodules.porch.world import FACT_VALUES, LABELS, Facts, draw_any_facts, is_possible, label_of, stream

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


def test_stems_cover_labels_and_inflections() -> None:
    for word in {*INFLECTIONS, *(part for label in LABELS for part in label.split("_") if part != "by")}:
        assert word.startswith(FORBIDDEN_STEMS), f"{word} would slip through"
    for word in ["the", "person", "remains", "in", "view", "and", "the", "parcel", "rests", "by", "the", "post"]:
        assert not word.startswith(FORBIDDEN_STEMS)


def test_facts_can_be_read_back() -> None:
    """10,000 descriptions, and every paraphrase of every value at least once."""
    texts = []
    for facts, text in drawn_descriptions():
        assert read_facts(text) == facts.as_dict(), text
        texts.append(text)
    said = "\n".join(texts)
    for values in PHRASES.values():
        assert all(phrase in said for phrases in values.values() for phrase in phrases)


def test_a_rationale_can_be_read_back_too() -> None:
    for number, facts in enumerate(POSSIBLE):
        text = rationale(facts, stream(0, "train", 0, number, "texts"))
        assert read_facts(text) == facts.as_dict()
        assert text.endswith(RULES[label_of(facts)])


def test_phrases_are_no_part_of_one_another() -> None:
    said = [(fact, value, p) for fact, values in PHRASES.items() for value, ps in values.items() for p in ps]
    for (fact, value, phrase), (other_fact, other_value, other) in itertools.permutations(said, 2):
        same = (fact, value) == (other_fact, other_value)
        assert same or phrase.lower() not in other.lower(), (fact, value, other_fact, other_value)
    assert set(PHRASES) == set(FACT_VALUES)
    assert all(set(PHRASES[fact]) == set(values) for fact, values in FACT_VALUES.items())


def test_unstated_and_contradictory_facts_are_none() -> None:
    facts = Facts("at_door", "left", "door", "0", "upright", "right", "gone", "on")
    text = describe(facts, np.random.Generator(np.random.PCG64(1)))
    assert read_facts("") == dict.fromkeys(FACT_VALUES)
    assert read_facts("Something happened on the porch, and it was dark.") == dict.fromkeys(FACT_VALUES)
    for fact, values in PHRASES.items():
        true = getattr(facts, fact)
        stated = next(phrase for phrase in values[true] if phrase in text)
        assert read_facts(text.replace(stated, "…")) == {**facts.as_dict(), fact: None}, "unstated"
        wrong = next(value for value in values if value != true)
        both = f"{text} {values[wrong][0]}"
        assert read_facts(both) == {**facts.as_dict(), fact: None}, "stated in two ways"
        assert read_facts(text.replace(stated, values[wrong][2]))[fact] == wrong
        again = f"{text} {values[true][0]}, {values[true][1]}"
        assert read_facts(again) == facts.as_dict(), "the same said twice is no contradiction"
    assert read_facts(text.upper()) == facts.as_dict()


def test_word_counts() -> None:
    lengths = [len(text.split()) for _, text in itertools.islice(drawn_descriptions(), 2000)]
    assert min(lengths) >= 35
    assert max(lengths) <= 49
    assert all(5 < len(rule.split()) < 15 for rule in RULES.values()), "a rule is one short sentence"


def test_paraphrases_vary_with_the_generator_alone() -> None:
    facts = draw_any_facts(stream(0, "pretrain", 0, 0, "facts"))
    texts = [describe(facts, stream(0, "pretrain", 0, i, "texts")) for i in range(30)]
    assert len(set(texts)) > 25
    assert texts == [describe(facts, stream(0, "pretrain", 0, i, "texts")) for i in range(30)]
    assert draw_scene(0, "pretrain", 0, 0, facts, wide=True).facts == facts
