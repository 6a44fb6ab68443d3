"""Further pretraining texts of the embedded base: compact facts, lists of frames, and random letters.

They contain neither label names, nor inflections of them, nor rules (``FORBIDDEN_STEMS``).
"""

from __future__ import annotations

import numpy as np

from vidreason.datamodules.porch.scene import FRAMES, WIDTH, Scene
from vidreason.datamodules.porch.texts import FORBIDDEN_STEMS, PHRASES
from vidreason.datamodules.porch.world import Facts
from vidreason.rewards.completion import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

FRAMES_QUESTION = "Go through the frames."
SLOTS_QUESTION = "List the facts."
ECHO_QUESTION = "Repeat: "
COLUMNS = 12
"""Number of columns of the picture in questions about a place; one more value means that nobody is there."""


def person_columns(scene: Scene) -> list[int]:
    """Returns the column 0..COLUMNS-1 of the person in each frame; COLUMNS if nobody is in the picture."""
    return [COLUMNS if np.isnan(x) or not 0 <= x < WIDTH else int(x * COLUMNS / WIDTH) for x in scene.x]


def slots(facts: Facts) -> str:
    """Returns the compact form of facts: one ``name: value`` per fact."""
    names = {"start_parcel": "before", "enters": "from", "reaches": "at", "turns": "turns", "posture": "posture",
             "exits": "to", "end_parcel": "after", "lamp": "lamp"}  # fmt: skip
    return "; ".join(f"{names[name]}: {value.replace('_', ' ')}" for name, value in facts.as_dict().items())


def frame_by_frame(scene: Scene) -> str:
    """Returns the states of person, parcel, body and lamp as one letter per frame.

    The column of the person is a to l, or - for nobody; the parcel is p at the door, h in hand, - neither; the body is
    u upright, d down; the lamp is y on, n off.
    """
    columns = "".join(f" {chr(ord('a') + c) if c < COLUMNS else '-'}" for c in person_columns(scene))
    parcel = "".join(
        " p" if scene.parcel_at_door[t] else " h" if scene.carrying[t] and not np.isnan(scene.x[t]) else " -"
        for t in range(FRAMES)
    )
    posture = "".join(" d" if lying else " u" for lying in scene.lying)
    lamp = "".join(" y" if on else " n" for on in scene.lamp_on)
    return f"person:{columns}; parcel:{parcel}; body:{posture}; lamp:{lamp}"


def echo(rng: np.random.Generator) -> str:
    """Returns random letters, words of descriptions, tags and signs for the model to repeat.

    On descriptions alone, most tokens would never be trained. A model that has repeated all of them learns a class name
    or a format from few examples.
    """
    while True:
        pieces = []
        for _ in range(2 + int(rng.integers(5))):
            kind = rng.random()
            if kind < 0.5:
                pieces.append(
                    "".join(_LETTERS[int(rng.integers(len(_LETTERS)))] for _ in range(1 + int(rng.integers(8))))
                )
            elif kind < 0.65:
                pieces.append(_WORDS[int(rng.integers(len(_WORDS)))])
            elif kind < 0.9:
                pieces.append(_TAGS[int(rng.integers(len(_TAGS)))])
            else:
                pieces.append(_SIGNS[int(rng.integers(len(_SIGNS)))])
        text = (" " if rng.random() < 0.5 else "").join(pieces)
        if not any(stem in text.lower() for stem in FORBIDDEN_STEMS):
            return text


_LETTERS = "abcdefghijklmnopqrstuvwxyz" * 3 + "aeiou" * 4 + "____0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WORDS = sorted(
    {word for values in PHRASES.values() for phrases in values.values() for p in phrases for word in p.split()}
)
_TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE, THINK_CLOSE + ANSWER_OPEN)
_SIGNS = "!\"#$%&'()*+,-./:;<=>?@[\\]^`{|}~\n"
