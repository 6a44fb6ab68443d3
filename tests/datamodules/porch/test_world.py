"""The world of porch: facts, decision list, twins and streams, against cases worked out by hand."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from vidreason.datamodules.porch.world import (
    ABNORMAL,
    FACT_VALUES,
    LABELS,
    PURPOSES,
    SPLIT_CODES,
    TWIN_EDITS,
    Facts,
    draw_any_facts,
    draw_facts,
    draw_twins,
    edit_event,
    is_possible,
    label_of,
    stream,
)

WALKS_BY = Facts("none", "left", "none", "0", "upright", "right", "none", "on")
TAKES = replace(WALKS_BY, start_parcel="at_door", reaches="door", end_parcel="gone")
BRINGS = replace(WALKS_BY, start_parcel="carried", reaches="door", end_parcel="at_door")
POSSIBLE = {facts for values in itertools.product(*FACT_VALUES.values()) if is_possible(facts := Facts(*values))}


@pytest.mark.parametrize(
    ("facts", "label"),
    [
        (WALKS_BY, "pass_by"),
        (replace(WALKS_BY, reaches="post"), "pass_by"),
        (replace(WALKS_BY, lamp="off"), "pass_by"),
        (replace(WALKS_BY, start_parcel="carried", end_parcel="gone"), "pass_by"),
        (replace(WALKS_BY, start_parcel="at_door", end_parcel="at_door"), "pass_by"),
        (replace(WALKS_BY, reaches="door"), "visit"),
        (replace(TAKES, end_parcel="at_door"), "visit"),
        (replace(TAKES, end_parcel="carried", exits="stays"), "visit"),
        (TAKES, "theft"),
        (BRINGS, "delivery"),
        (replace(BRINGS, end_parcel="gone"), "visit"),
        (replace(WALKS_BY, turns="many"), "loiter"),
        (replace(TAKES, turns="many"), "loiter"),
        (replace(BRINGS, turns="many"), "loiter"),
        (replace(TAKES, exits="door"), "entry"),
        (replace(BRINGS, exits="door", turns="many"), "entry"),
        (replace(WALKS_BY, reaches="post", lamp="off"), "tamper"),
        (replace(WALKS_BY, reaches="post", lamp="off", turns="many"), "tamper"),
        (replace(WALKS_BY, posture="down", exits="stays"), "fall"),
        (replace(WALKS_BY, posture="down", exits="stays", reaches="post", lamp="off", turns="many"), "fall"),
    ],
)
def test_the_decision_list(facts: Facts, label: str) -> None:
    assert is_possible(facts)
    assert label_of(facts) == label


@pytest.mark.parametrize(
    "facts",
    [
        replace(WALKS_BY, end_parcel="at_door"),  # out of nothing
        replace(WALKS_BY, end_parcel="carried"),
        replace(WALKS_BY, end_parcel="gone"),  # there was none
        replace(TAKES, reaches="none"),  # taken from afar
        replace(TAKES, reaches="post"),
        replace(TAKES, end_parcel="none"),
        replace(TAKES, end_parcel="carried"),  # in hand, yet its holder has left
        replace(TAKES, exits="stays"),  # gone, yet nobody has left
        replace(BRINGS, reaches="none"),  # put down from afar
        replace(BRINGS, end_parcel="none"),
        replace(WALKS_BY, posture="down"),  # leaves lying down
        replace(WALKS_BY, exits="door"),  # goes in without having been there
        replace(WALKS_BY, exits="door", reaches="post"),
    ],
)
def test_what_cannot_happen(facts: Facts) -> None:
    assert not is_possible(facts)


def test_every_label_can_happen_and_only_they() -> None:
    assert {label_of(facts) for facts in POSSIBLE} == set(LABELS)
    assert len(LABELS) == 8
    assert {"theft", "loiter", "fall", "tamper"} == ABNORMAL


def test_the_facts_of_a_label_have_it_and_vary() -> None:
    for number, label in enumerate(LABELS):
        drawn = [draw_facts(stream(0, "train", 0, i, "facts"), label) for i in range(8 * number, 8 * number + 60)]
        assert {label_of(facts) for facts in drawn} == {label}
        assert set(drawn) <= POSSIBLE
        assert len(set(drawn)) >= 8, f"{label} knows one story only"
        assert {facts.enters for facts in drawn} == {"left", "right"}


def test_no_single_fact_gives_five_of_the_labels_away() -> None:
    """Delivery, theft, visit, tamper and pass_by share every value of every fact with another label."""
    labels_of_value: dict[tuple[str, str], set[str]] = {}
    for label in LABELS:
        for i in range(150):
            for fact, value in draw_facts(stream(1, "train", 0, i, "facts"), label).as_dict().items():
                labels_of_value.setdefault((fact, value), set()).add(label)
    given_away = {next(iter(labels)) for labels in labels_of_value.values() if len(labels) == 1}
    assert given_away == {"fall", "entry"}


def test_every_edit_flips_the_label() -> None:
    for number, edit in enumerate(TWIN_EDITS):
        for pair in range(number, number + 5 * len(TWIN_EDITS), len(TWIN_EDITS)):
            first, second = draw_twins(stream(2, "test", 1, pair, "facts"), pair)
            assert (label_of(first), label_of(second)) == (edit.label, edit.twin)
            assert edit.label != edit.twin
            assert {first, second} <= POSSIBLE
            changed = {name for name in FACT_VALUES if getattr(first, name) != getattr(second, name)}
            follows = {"exits", "end_parcel"} if edit.fact == "posture" else set()
            assert edit.fact in changed
            assert changed <= {edit.fact} | follows, "more than one event was edited"


def test_who_ends_on_the_ground_stays_and_keeps_the_parcel() -> None:
    assert edit_event(TAKES, "posture", "down") == replace(TAKES, posture="down", exits="stays", end_parcel="carried")
    assert edit_event(BRINGS, "posture", "down") == replace(BRINGS, posture="down", exits="stays")
    assert edit_event(WALKS_BY, "lamp", "off") == replace(WALKS_BY, lamp="off")


@pytest.mark.parametrize("pairs", [4, 12, 40])
def test_twins_are_balanced(pairs: int) -> None:
    counts = Counter(
        label_of(facts) for pair in range(pairs) for facts in draw_twins(stream(0, "test", 0, pair, "facts"), pair)
    )
    assert counts == dict.fromkeys(LABELS, 2 * pairs // 8)


def test_pretraining_draws_every_combination_alike() -> None:
    drawn = 5000
    counts = Counter(draw_any_facts(stream(0, "pretrain", 0, i, "facts")) for i in range(drawn))
    assert set(counts) == POSSIBLE, "a combination that can happen never occurs, or one that cannot does"
    expected = drawn / len(POSSIBLE)
    chi_square = sum((counts[facts] - expected) ** 2 / expected for facts in POSSIBLE)
    freedom = len(POSSIBLE) - 1
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom), "the facts hang together by more than physics"
    for fact, values in FACT_VALUES.items():
        for value in values:
            share = sum(count for facts, count in counts.items() if getattr(facts, fact) == value) / drawn
            assert share > 0.08, f"{fact}: {value} is hardly ever seen"


def test_no_two_streams_are_the_same() -> None:
    levels = {"pretrain": [0], "train": [0], "val": [0], "cal": [0], "test": range(5)}
    assert set(levels) == set(SPLIT_CODES)
    assert len(set(SPLIT_CODES.values())) == len(SPLIT_CODES)
    assert len(set(PURPOSES.values())) == len(PURPOSES)
    places = [
        (seed, split, level, index, purpose)
        for seed in (0, 1, 2, 3, 7, 2**31)
        for split, ladder in levels.items()
        for level in ladder
        for index in (0, 1, 2, 3, 4, 5, 79, 100_000)
        for purpose in PURPOSES
    ]
    keys = {(seed, SPLIT_CODES[split], level, i, PURPOSES[p]) for seed, split, level, i, p in places}
    assert len(keys) == len(places)
    first = {stream(*place).random() for place in places}
    assert len(first) == len(places)


def test_a_stream_can_be_drawn_again() -> None:
    one, other = (stream(5, "val", 0, 3, "path").random(4) for _ in range(2))
    assert one.tolist() == other.tolist()
    by_hand = np.random.Generator(np.random.PCG64([5, 2, 0, 3, 2])).random(4)
    assert one.tolist() == by_hand.tolist()
