"""Closed questions about a clip: whether they are the question that the run was trained on, and their answers.

C stands for the possible answers of a question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vidreason.datamodules.task import ClassSpec, Task

_UNSAID = "Which of these answers fits the video best?"


@dataclass(frozen=True)
class Question:
    """A question with a closed set of answers.

    Raises:
        ValueError: If there are fewer than two answers, or one is empty, occurs twice or is no line of text.
    """

    instructions: str
    names: tuple[str, ...]
    """[C] the answers as the model writes them."""
    definitions: tuple[str, ...] = ()
    """[C] definitions of the answers; empty if the question gives none."""

    def __post_init__(self) -> None:
        self.task()

    def task(self) -> Task:
        """Returns the question as a task with the default prompts."""
        definitions = self.definitions or ("",) * len(self.names)
        classes = tuple(ClassSpec(*pair) for pair in zip(self.names, definitions, strict=True))
        return Task("question", self.instructions.strip() or _UNSAID, classes)

    def is_of(self, task: Task) -> bool:
        """Returns whether this is the question that a run was trained on, in any order of the answers."""
        return set(self.names) == set(task.label_names) and self.instructions.strip() == task.question.strip()


def text_of(name: str | bool) -> str:
    """Returns an answer as text; a boolean as JSON writes it."""
    return name if isinstance(name, str) else str(name).lower()


def above_chance(probs: Sequence[float]) -> float:
    """Returns the largest probability, rescaled so that a uniform distribution has 0: (p - 1/C) / (1 - 1/C).

    >>> above_chance([0.75, 0.25])
    0.5
    """
    chance = 1 / len(probs)
    return max(0.0, (max(probs) - chance) / (1 - chance))


def mean_level(probs: Sequence[float]) -> float:
    """Returns the expected level, which counts from 0.

    >>> mean_level([0.25, 0.25, 0.5])
    1.25
    """
    return sum(level * p for level, p in enumerate(probs))


def level_confidence(probs: Sequence[float]) -> float:
    """Returns how close the levels lie to the likeliest one: 1 at one level, 0 if as far apart as uniform ones.

    >>> level_confidence([0.0, 1.0, 0.0])
    1.0
    """
    count, best = len(probs), max(range(len(probs)), key=probs.__getitem__)
    distance = sum(p * abs(level - best) for level, p in enumerate(probs))
    uniform = sum(abs(level - (count - 1) / 2) for level in range(count)) / count
    return max(0.0, 1 - distance / uniform)
