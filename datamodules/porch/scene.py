"""The scene of a porch clip: its looks and the motion of the person, by level of openness.

Each level adds variation to that of the levels before: L0 and L1 draw from the pools of training (L0 with the
shortcut), L2 varies appearance, L3 motion and sensor, L4 clutter and view. ``wide`` is the distribution of pretraining:
all looks except striped walls and patterned clothing, speeds up to 1.3, and no variation of L4.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from vidreason.datamodules.porch.world import ABNORMAL, LABELS, Facts, label_of, stream

WIDTH, HEIGHT, FRAMES = 96, 64, 12
SHORTCUT = 0.85
"""Share of L0 clips in which night correlates with abnormal labels and clothing with the label."""

VISIT, LONGEST_VISIT, SHORTEST_VISIT, UNEVEN_VISIT = 9.9, 11.4, 9.0, 9.7
"""Frames from entering to leaving: at speed 1, at most, at least, and at least with uneven frame times."""

TRAIN_CLOTHING = tuple((0.02 + 0.1 * i) % 1.0 for i in range(10))
TRAIN_WALLS = (0.06, 0.12, 0.30, 0.55, 0.62)
TRAIN_DOORS = (
    (0.02, 0.65, 0.45),
    (0.08, 0.6, 0.35),
    (0.33, 0.5, 0.3),
    (0.6, 0.6, 0.4),
    (0.0, 0.0, 0.85),
    (0.75, 0.3, 0.4),
)
TRAIN_PARCELS = ((0.09, 0.55, 0.75), (0.11, 0.35, 0.9), (0.07, 0.7, 0.6), (0.13, 0.2, 0.95))
HSV = tuple[float, float, float]


@dataclass(frozen=True)
class Looks:
    """The appearance of a scene; colours are hue, saturation and value in 0..1, lengths in pixels."""

    night: bool
    wall: Literal["plain", "brick", "stripes"]
    wall_hue: float
    texture: float
    texture_cells: int
    ground: int
    door: HSV
    door_x: int
    post_x: int
    parcel: HSV
    parcel_side: int
    clothing: float
    trousers: float
    pattern: bool
    person: int


@dataclass(frozen=True)
class Sensor:
    """The effects of the camera: standard deviation of the noise, gain, and largest shift of a frame in pixels."""

    noise: int
    gain: float
    jitter: int


@dataclass(frozen=True)
class Scene:
    """The input of the renderer for one clip."""

    facts: Facts
    looks: Looks
    sensor: Sensor
    x: tuple[float, ...]
    """[FRAMES] column of the person's feet in pixels; NaN once the person has left."""
    lying: tuple[bool, ...]
    carrying: tuple[bool, ...]
    parcel_at_door: tuple[bool, ...]
    lamp_on: tuple[bool, ...]
    cluttered: bool


def draw_scene(
    seed: int, split: str, level: int, index: int, facts: Facts, *, wide: bool = False, shortcut: float = SHORTCUT
) -> Scene:
    """Draws the looks, path and sensor of a clip at ``level`` (0..4) for given facts."""
    looks = _draw_looks(stream(seed, split, level, index, "looks"), level, facts, wide, shortcut)
    sensor = _draw_sensor(stream(seed, split, level, index, "sensor"), level, wide)
    path = _draw_path(stream(seed, split, level, index, "path"), level, facts, looks, wide)
    return Scene(facts, looks, sensor, *path, cluttered=level >= 4 and not wide)


def _draw_looks(rng: np.random.Generator, level: int, facts: Facts, wide: bool, shortcut: float) -> Looks:
    # All numbers are drawn at once and used by index, so that a level or an edited fact does not shift later ones.
    u = rng.random(24)
    new = level >= 2 or wide
    label = label_of(facts)
    dark = bool(u[0] < shortcut) == (label in ABNORMAL) if level == 0 and not wide else bool(u[0] < 0.5)
    hue = TRAIN_CLOTHING[int(u[2] * 10)]
    if level == 0 and not wide and u[1] < shortcut:
        hue = TRAIN_CLOTHING[LABELS.index(label)]
    if new:
        # Between the hues of training, which are 0.1 apart.
        hue = (hue + 0.05) % 1.0 if level >= 2 and not wide else u[2]
    wall: Literal["plain", "brick", "stripes"] = "plain"
    if new:
        wall = ("brick" if u[3] < 0.4 else "plain") if wide else ("brick" if u[3] < 0.4 else "stripes")
    mirrored = u[4] < 0.5
    door_x = 22 + int(u[5] * 13)
    post_x = 68 + int(u[6] * 13)
    if mirrored:
        door_x, post_x = WIDTH - 1 - door_x, WIDTH - 1 - post_x
    any_colour: HSV = (u[8], 0.25 + 0.6 * u[9], 0.3 + 0.5 * u[10])
    any_parcel: HSV = (u[12], 0.2 + 0.7 * u[13], 0.55 + 0.4 * u[14])
    return Looks(
        night=dark,
        wall=wall,
        wall_hue=u[7] if wide else (TRAIN_WALLS[int(u[7] * 5)] + (0.08 if new else 0.0)) % 1.0,
        texture=0.02 + 0.10 * u[15],
        texture_cells=4 + int(u[16] * 20),
        ground=48 + int(u[17] * 5),
        door=any_colour if new else TRAIN_DOORS[int(u[8] * 6)],
        door_x=door_x,
        post_x=post_x,
        parcel=any_parcel if new else TRAIN_PARCELS[int(u[12] * 4)],
        parcel_side=1 if u[18] < 0.5 else -1,
        clothing=hue,
        trousers=u[19],
        pattern=level >= 2 and not wide and u[20] < 0.6,
        person=(14 + int(u[21] * 19)) if new else 17 + int(u[21] * 12),
    )


def _draw_sensor(rng: np.random.Generator, level: int, wide: bool) -> Sensor:
    u = rng.random(4)
    moved = level >= 3 or wide
    return Sensor(
        noise=2 + int(u[0] * (15 if moved else 7)),
        gain=0.65 + 0.65 * u[1] if moved else 1.0,
        jitter=int(u[2] * 3) if moved else 0,
    )


_Path = tuple[tuple[float, ...], tuple[bool, ...], tuple[bool, ...], tuple[bool, ...], tuple[bool, ...]]


def _draw_path(rng: np.random.Generator, level: int, facts: Facts, looks: Looks, wide: bool) -> _Path:
    """Draws the positions and states of the 12 frames: waypoints with pauses, connected at constant speed.

    If the person would walk too fast to be in the picture for 8 frames, the pauses are longer.
    """
    u = rng.random(16)
    uneven = level >= 3 and not wide
    slow, fast = (0.65, 1.3) if wide else (0.65, 1.6) if level >= 3 else (0.85, 1.2)
    stops = _waypoints(facts, looks, u)
    legs = [0.0] + [abs(b - a) for (a, _), (b, _) in pairwise(stops)]
    speed, shortest = slow + (fast - slow) * u[0], UNEVEN_VISIT if uneven else SHORTEST_VISIT
    active = min(max(VISIT / speed, shortest), LONGEST_VISIT)
    if facts.exits == "stays":
        active = FRAMES - 0.2
    standing = sum(pause for _, pause in stops)
    walking = (active - standing) / max(speed * shortest / VISIT, 1.0)
    longer = (active - walking) / standing
    pace = max(sum(legs), 1.0) / walking  # pixels per frame
    times: list[tuple[float, float]] = []
    now, event_at = 0.0, {"goal": -1.0, "end": -1.0}
    for i, (x, pause) in enumerate(stops):
        now += legs[i] / pace
        pause *= longer
        times.append((now, x))
        if i == len(stops) - 2 and facts.reaches != "none":
            event_at["goal"] = now + pause * 0.55
        if i == len(stops) - 1:
            event_at["end"] = now
        now += pause
        times.append((now, x))
    clock = np.arange(FRAMES) + 0.35  # time of each frame, in frames; events fall between two of them
    if uneven:
        clock = clock + (rng.random(FRAMES) - 0.5) * 0.5
    x = np.interp(clock, [t for t, _ in times], [p for _, p in times])
    leaves = facts.exits != "stays"
    gone = leaves & (clock >= event_at["end"] - (0.25 if facts.exits == "door" else 0.0))
    goal = clock >= event_at["goal"] if facts.reaches != "none" else np.zeros(FRAMES, bool)
    lying = (clock >= event_at["end"] + 0.4) & (facts.posture == "down")
    took = facts.start_parcel == "at_door" and facts.end_parcel in ("gone", "carried")
    put = facts.start_parcel == "carried" and facts.end_parcel == "at_door"
    carrying = (goal if took else ~goal if put else np.full(FRAMES, facts.start_parcel == "carried")) & ~gone
    at_door = ~goal if took else goal if put else np.full(FRAMES, facts.start_parcel == "at_door")
    lamp_from = event_at["goal"] if facts.reaches == "post" else 3.0 + 5.0 * u[1]
    lamp_on = (clock < lamp_from) | (facts.lamp == "on")
    feet = np.where(gone, np.nan, x)
    return (
        tuple(float(v) for v in feet),
        tuple(bool(v) for v in lying),
        tuple(bool(v) for v in carrying),
        tuple(bool(v) for v in at_door),
        tuple(bool(v) for v in lamp_on),
    )


def _waypoints(facts: Facts, looks: Looks, u: np.ndarray) -> list[tuple[float, float]]:
    """Returns waypoints as (column, pause in frames): entry, pacing, the goal and the last point."""
    sides = {"left": -7.0, "right": WIDTH + 6.0}
    middle = WIDTH / 2 + (u[3] - 0.5) * 10
    stops = [(sides[facts.enters], 0.0)]
    if facts.turns == "many":
        reach = 14 + 5 * u[4]
        sign = 1.0 if facts.enters == "left" else -1.0
        stops += [(middle + sign * reach * s, 0.3) for s in (1, -1, 1, -1)]
    goal = {"door": float(looks.door_x), "post": looks.post_x + (6.0 if looks.post_x < WIDTH / 2 else -6.0)}
    if facts.reaches != "none":
        stops.append((goal[facts.reaches], 1.9))
    elif facts.turns == "0":
        stops.append((middle, 0.5))
    if facts.exits in sides:
        stops.append((sides[facts.exits], 0.0))
    elif facts.exits == "door":
        stops.append((looks.door_x + 0.0, 0.0))
    else:
        aside = stops[-1][0] if u[5] < 0.4 else middle + (u[6] - 0.5) * 24
        stops.append((aside, 3.2 if facts.posture == "down" else 2.2))
    return stops
