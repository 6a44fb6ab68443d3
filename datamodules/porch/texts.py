"""Texts of porch: descriptions of facts, reading facts from a description, and rationales.

Descriptions contain neither label names, nor inflections of them, nor rules (``FORBIDDEN_STEMS``). Rationales contain
the rule; they stand for the work of a teacher, and stages train on them only if configured to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from vidreason.datamodules.porch.world import FACT_VALUES, Facts, label_of

PHRASES: Mapping[str, Mapping[str, tuple[str, str, str]]] = {
    "start_parcel": {
        "none": ("No parcel is in view.", "There is no parcel at first.", "The porch holds no parcel."),
        "at_door": (
            "A parcel is already at the door.",
            "A parcel lies by the door.",
            "A parcel waits on the porch.",
        ),
        "carried": (
            "Someone brings a parcel.",
            "A parcel is carried into view.",
            "A parcel comes along.",
        ),
    },
    "enters": {
        "left": ("A person comes from the left", "Someone walks in from the left", "From the left comes a person"),
        "right": (
            "A person comes from the right",
            "Someone walks in from the right",
            "From the right comes a person",
        ),
    },
    "turns": {
        "0": ("on a straight way", "without turning about", "without pacing"),
        "many": ("pacing back and forth", "turning again and again", "walking to and fro"),
    },
    "reaches": {
        "none": ("stops at nothing", "keeps clear of both", "goes to no goal"),
        "door": ("goes to the door", "stops at the door", "walks up to the door"),
        "post": ("goes to the post", "stops at the post", "walks up to the post"),
    },
    "posture": {
        "upright": ("stays upright", "keeps standing", "stays on foot"),
        "down": ("goes to the ground", "ends up lying", "drops to the ground"),
    },
    "exits": {
        "left": ("leaves to the left", "walks off to the left", "goes off left"),
        "right": ("leaves to the right", "walks off to the right", "goes off right"),
        "door": ("goes inside", "walks into the house", "vanishes through the door"),
        "stays": ("does not leave", "remains in view", "waits there"),
    },
    "end_parcel": {
        "none": ("there is still no parcel", "no parcel has come", "the porch is bare"),
        "at_door": ("the parcel is at the door", "the parcel lies by the door", "the parcel rests on the porch"),
        "carried": ("the parcel is in hand", "the parcel is still held", "the person holds the parcel"),
        "gone": ("the parcel is gone", "the parcel is missing", "the parcel has vanished"),
    },
    "lamp": {
        "on": ("the lamp is still on", "the lamp shines", "the light is on"),
        "off": ("the lamp is off", "the lamp has gone dark", "the light is out"),
    },
}
"""Three phrases per value of each fact; no phrase is part of a phrase of another fact or value."""

FORBIDDEN_STEMS = (
    "deliver", "thief", "theft", "thiev", "steal", "stol", "visit", "entry", "entri", "entr", "enter", "loiter",
    "linger", "fall", "fell", "tamper", "pass", "normal", "abnormal",
)  # fmt: skip
"""Stems of the label names and their inflections; no word of a pretraining text begins with one."""

RULES: Mapping[str, str] = {
    "delivery": "Bringing a parcel and leaving it there is a delivery.",
    "theft": "Taking a parcel away is theft.",
    "visit": "Going to the door without taking or leaving anything there is a visit.",
    "entry": "Going into the house is an entry.",
    "loiter": "Pacing about without purpose is loitering.",
    "fall": "A person who ends on the ground has had a fall.",
    "tamper": "Putting out the lamp at its post is tampering.",
    "pass_by": "Whoever touches nothing and walks on only passes by.",
}

DESCRIBE_QUESTION = "Describe the video."


def describe(facts: Facts, rng: np.random.Generator) -> str:
    """Returns a description of 35–49 words that states every fact once, with phrases drawn by ``rng``."""
    said = {name: PHRASES[name][value][int(rng.integers(3))] for name, value in facts.as_dict().items()}
    return (
        f"{said['start_parcel']} {said['enters']}, {said['turns']}. "
        f"The person {said['reaches']} and {said['posture']}, then {said['exits']}. "
        f"At the end {said['end_parcel']} and {said['lamp']}."
    )


def rationale(facts: Facts, rng: np.random.Generator) -> str:
    """Returns a teacher's rationale: a description and the rule that determines the label."""
    return f"{describe(facts, rng)} {RULES[label_of(facts)]}"


_PATTERNS = {
    name: {
        value: re.compile("|".join(re.escape(p) for p in phrases), re.IGNORECASE) for value, phrases in values.items()
    }
    for name, values in PHRASES.items()
}


def read_facts(text: str) -> dict[str, str | None]:
    """Reads the facts that a description states; None for a fact without a value or with several.

    >>> from vidreason.datamodules.porch.texts import read_facts
    >>> read_facts("A parcel waits on the porch. The parcel is gone and the light is out.")["end_parcel"]
    'gone'
    """
    found = {}
    for name in FACT_VALUES:
        stated = [value for value, pattern in _PATTERNS[name].items() if pattern.search(text)]
        found[name] = stated[0] if len(stated) == 1 else None
    return found
