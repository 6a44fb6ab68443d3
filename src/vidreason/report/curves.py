"""Training curves of a stage, from its TensorBoard files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vidreason.config.loggers import MAIN
from vidreason.run_folder import TENSORBOARD_FOLDER

_POINTS = 1000
"""Most points of a curve; TensorBoard draws them evenly from longer ones."""
_PANELS = (
    ("reward", r"train/reward"),
    ("parts of the reward", r"train/rewards/(.+)/mean"),
    ("KL divergence from the reference", r"train/kl"),
    ("entropy", r"train/entropy"),
    ("tokens of a completion", r"train/completions/mean_length"),
    ("share of groups with equal rewards", r"train/frac_reward_zero_std"),
    ("share of completions that parse", r"train/parse_rate"),
    ("loss", r"train/(loss(?:_\w+)?)"),
    ("validation: accuracy", r"val/acc"),
    ("validation: NLL", r"val/(nll(?:_scaled)?)"),
)
"""Title of a panel, and the names of its values as they are logged; a group of the expression names the curve."""


@dataclass(frozen=True)
class Curve:
    """One scalar over the steps of a stage, of equal length."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis."""

    title: str
    curves: tuple[Curve, ...]


def read_curves(stage: Path) -> list[Panel]:
    """Reads the training curves of a stage.

    Args:
        stage: Folder of the stage.

    Returns:
        The panels that have a curve of at least two points; empty for a stage that does not train.
    """
    folder = stage / TENSORBOARD_FOLDER
    if not folder.is_dir():
        return []
    events = EventAccumulator(str(folder), size_guidance={"scalars": _POINTS, "images": 1, "tensors": 1})
    events.Reload()
    tags = [str(tag) for tag in events.Tags()["scalars"]]
    panels = []
    for title, expression in _PANELS:
        matches = [(tag, match) for tag in tags if (match := re.fullmatch(expression, tag.removeprefix(MAIN)))]
        curves = [_curve(events, tag, match.groups()[0] if match.groups() else title) for tag, match in matches]
        panels.append(Panel(title, tuple(curve for curve in curves if len(curve.steps) > 1)))
    return [panel for panel in panels if panel.curves]


def _curve(events: EventAccumulator, tag: str, name: str) -> Curve:
    found = events.Scalars(tag)
    return Curve(name, tuple(int(event.step) for event in found), tuple(float(event.value) for event in found))
