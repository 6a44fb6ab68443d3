"""The world of porch: facts, labels and their random draws.

A doorbell camera films one person. Eight facts state what happened; the label follows from them by a decision list.
Every draw has its own NumPy PCG64 stream, seeded with ``[seed, split, level, index, purpose]`` and read with ``random``
and ``integers`` only, so that clips are independent of each other. The label is not part of a seed: twins (the same
scene with one event edited so that the label changes) share all other draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

FACT_VALUES: Mapping[str, tuple[str, ...]] = {
    "start_parcel": ("none", "at_door", "carried"),
    "enters": ("left", "right"),
    "reaches": ("none", "door", "post"),
    "turns": ("0", "many"),
    "posture": ("upright", "down"),
    "exits": ("left", "right", "door", "stays"),
    "end_parcel": ("none", "at_door", "carried", "gone"),
    "lamp": ("on", "off"),
}
"""The eight facts and their values, in the order in which a description states them."""

LABELS = ("delivery", "theft", "visit", "entry", "loiter", "fall", "tamper", "pass_by")
ABNORMAL = frozenset({"theft", "loiter", "fall", "tamper"})
SPLIT_CODES: Mapping[str, int] = {"pretrain": 0, "train": 1, "val": 2, "cal": 3, "test": 4}
PURPOSES: Mapping[str, int] = {"facts": 0, "looks": 1, "path": 2, "sensor": 3, "texts": 4, "clutter": 5, "labels": 6,
                                "grain": 7}  # fmt: skip


def stream(seed: int, split: str, level: int, index: int, purpose: str) -> np.random.Generator:
    """Returns the generator of one purpose of one clip; different arguments give different streams."""
    key = [seed, SPLIT_CODES[split], level, index, PURPOSES[purpose]]
    return np.random.Generator(np.random.PCG64(key))


@dataclass(frozen=True)
class Facts:
    """The facts of one clip; ``FACT_VALUES`` has the values of each field."""

    start_parcel: str
    enters: str
    reaches: str
    turns: str
    posture: str
    exits: str
    end_parcel: str
    lamp: str

    def as_dict(self) -> dict[str, str]:
        """Returns the values by name, in the order of ``FACT_VALUES``."""
        return {name: getattr(self, name) for name in FACT_VALUES}


def is_possible(facts: Facts) -> bool:
    """Returns whether the facts can occur together: parcels obey physics, and a person who is down stays."""
    f = facts
    leaves = f.exits != "stays"
    # The end states of the parcel that are possible from each start state.
    ends = {
        "none": {"none"},
        "at_door": {"at_door"} | ({"gone" if leaves else "carried"} if f.reaches == "door" else set()),
        "carried": {"gone" if leaves else "carried"} | ({"at_door"} if f.reaches == "door" else set()),
    }
    return (
        f.end_parcel in ends[f.start_parcel]
        and (f.posture == "upright" or f.exits == "stays")
        and (f.exits != "door" or f.reaches == "door")
    )


def label_of(facts: Facts) -> str:
    """Returns the label of the facts; the first rule that applies decides."""
    f = facts
    if f.posture == "down":
        return "fall"
    if f.reaches == "post" and f.lamp == "off":
        return "tamper"
    if f.exits == "door":
        return "entry"
    if f.turns == "many":
        return "loiter"
    if f.start_parcel == "carried" and f.end_parcel == "at_door":
        return "delivery"
    if f.start_parcel == "at_door" and f.end_parcel == "gone":
        return "theft"
    if f.reaches == "door":
        return "visit"
    return "pass_by"


def _pick(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]


def draw_any_facts(rng: np.random.Generator) -> Facts:
    """Draws every fact independently until they can occur together (pretraining uses neither scripts nor labels)."""
    while True:
        facts = Facts(*(_pick(rng, values) for values in FACT_VALUES.values()))
        if is_possible(facts):
            return facts


_SCRIPTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "delivery": {"start_parcel": ("carried",), "end_parcel": ("at_door",), "exits": ("left", "right")},
    "theft": {"start_parcel": ("at_door",), "end_parcel": ("gone",), "exits": ("left", "right")},
    "visit": {"reaches": ("door",), "exits": ("left", "right", "left", "right", "stays")},
    "entry": {"exits": ("door",)},
    "loiter": {"turns": ("many",), "reaches": ("none", "none", "door", "post")},
    "fall": {"posture": ("down",), "turns": ("0", "0", "many")},
    "tamper": {"reaches": ("post",), "lamp": ("off",), "turns": ("0", "0", "many")},
    "pass_by": {"reaches": ("none", "none", "post"), "exits": ("left", "right", "left", "right", "stays")},
}
_USUAL: Mapping[str, tuple[str, ...]] = {"posture": ("upright",), "turns": ("0",), "lamp": ("on", "on", "off")}


def draw_facts(rng: np.random.Generator, label: str) -> Facts:
    """Draws facts whose label is ``label``; facts that the label does not determine vary."""
    script = {**FACT_VALUES, **_USUAL, **_SCRIPTS[label]}
    while True:
        facts = Facts(*(_pick(rng, script[name]) for name in FACT_VALUES))
        if is_possible(facts) and label_of(facts) == label:
            return facts


@dataclass(frozen=True)
class TwinEdit:
    """One event that turns a clip of class ``label`` into one of class ``twin``."""

    label: str
    twin: str
    fact: str
    value: str


TWIN_EDITS: tuple[TwinEdit, ...] = (
    # Three matchings of the eight labels: each group of four contains every label once.
    TwinEdit("visit", "theft", "end_parcel", "gone"),
    TwinEdit("delivery", "fall", "posture", "down"),
    TwinEdit("pass_by", "tamper", "lamp", "off"),
    TwinEdit("loiter", "entry", "exits", "door"),
    TwinEdit("theft", "entry", "exits", "door"),
    TwinEdit("visit", "delivery", "end_parcel", "at_door"),
    TwinEdit("tamper", "loiter", "lamp", "on"),
    TwinEdit("pass_by", "fall", "posture", "down"),
    TwinEdit("pass_by", "visit", "reaches", "door"),
    TwinEdit("delivery", "entry", "exits", "door"),
    TwinEdit("theft", "fall", "posture", "down"),
    TwinEdit("tamper", "loiter", "lamp", "on"),
)


def edit_event(facts: Facts, fact: str, value: str) -> Facts:
    """Returns the facts with one event edited, including its physical consequences."""
    edited = replace(facts, **{fact: value})
    if fact == "posture" and value == "down":
        # A person who is down cannot have left with the parcel.
        held = "carried" if edited.end_parcel == "gone" else edited.end_parcel
        edited = replace(edited, exits="stays", end_parcel=held)
    return edited


def draw_twins(rng: np.random.Generator, pair: int) -> tuple[Facts, Facts]:
    """Draws the facts of twin pair number ``pair``: two clips of different labels that differ in one event."""
    edit = TWIN_EDITS[pair % len(TWIN_EDITS)]
    while True:
        first = draw_facts(rng, edit.label)
        second = edit_event(first, edit.fact, edit.value)
        if is_possible(second) and label_of(second) == edit.twin:
            return first, second
