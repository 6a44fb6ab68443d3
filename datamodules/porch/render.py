"""The renderer of porch: draws a scene as uint8 frames in NumPy.

Colours are given as hue, saturation and value in 0..1; images are float32 [HEIGHT, WIDTH, 3] in 0..255 until the last
step. Lengths are in pixels.
"""

from __future__ import annotations

import colorsys
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from vidreason.datamodules.atomic_files import atomic_file
from vidreason.datamodules.porch.scene import FRAMES, HEIGHT, WIDTH, Looks, Scene

Image = NDArray[np.float32]
Frames = NDArray[np.uint8]
Colour = NDArray[np.float32]
_ENCODER = {"crf": "14", "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
"""One thread and no macroblock tree: on pictures this small, the look-ahead of x264 reads uninitialised memory, so that
equal frames sometimes give different bytes."""
DOOR_HALF, DOOR_HEIGHT = 9, 33
PARCEL_HALF, PARCEL_HEIGHT = 4, 7


def render(scene: Scene, grain_rng: np.random.Generator, clutter_rng: np.random.Generator) -> Frames:
    """Renders a clip as [FRAMES, HEIGHT, WIDTH, 3] uint8."""
    backdrop = _backdrop(scene.looks, grain_rng)
    clutter = clutter_rng.random(16)
    frames = np.empty((FRAMES, HEIGHT, WIDTH, 3), np.float32)
    for t in range(FRAMES):
        frames[t] = backdrop
        _draw_frame(frames[t], scene, t, clutter)
    return _sense(frames, scene, grain_rng, clutter)


def to_mono(frames: Frames) -> Frames:
    """Converts frames to those of a monochrome camera: BT.601 luma in all three channels."""
    luma = frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    grey: Frames = np.repeat(luma.round().astype(np.uint8)[..., None], 3, axis=-1)
    return grey


def write_mp4(path: Path, frames: Frames, fps: int = 4) -> None:
    """Writes frames [T, H, W, 3] uint8 as an H.264 file; the same frames give the same bytes."""
    with atomic_file(path) as draft, av.open(str(draft), "w") as container:
        video = container.add_stream("libx264", rate=fps, options=_ENCODER)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        for picture in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32) * 255


def _fill(image: Image, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
    """Fills the rectangle [x0, x1) × [y0, y1), clipped to the image."""
    left, right = max(round(x0), 0), min(round(x1), WIDTH)
    top, bottom = max(round(y0), 0), min(round(y1), HEIGHT)
    if left < right and top < bottom:
        image[top:bottom, left:right] = colour


def _backdrop(looks: Looks, rng: np.random.Generator) -> Image:
    image = np.empty((HEIGHT, WIDTH, 3), np.float32)
    cells = rng.random((looks.texture_cells, looks.texture_cells + 4))
    rows = (np.arange(HEIGHT) * cells.shape[0] // HEIGHT)[:, None]
    columns = (np.arange(WIDTH) * cells.shape[1] // WIDTH)[None, :]
    texture = (1 + looks.texture * (2 * cells[rows, columns] - 1)).astype(np.float32)[..., None]
    image[:] = _rgb(looks.wall_hue, 0.25, 0.72) * texture
    if looks.wall == "brick":
        image[::6, :] *= 0.8
        for row in range(0, HEIGHT, 6):
            image[row : row + 6, (row // 6 % 2) * 5 :: 10] *= 0.8
    elif looks.wall == "stripes":
        image[:, (np.arange(WIDTH) // 5) % 2 == 0] *= 0.82
    image[looks.ground :] = _rgb(looks.wall_hue + 0.4, 0.12, 0.45) * texture[looks.ground :]
    left, right, top = looks.door_x - DOOR_HALF, looks.door_x + DOOR_HALF, looks.ground - DOOR_HEIGHT
    _fill(image, left - 2, top - 2, right + 2, looks.ground, _rgb(0.1, 0.05, 0.95))
    _fill(image, left, top, right, looks.ground, _rgb(*looks.door))
    _fill(image, right - 4, looks.ground - 16, right - 2, looks.ground - 13, _rgb(0.13, 0.7, 0.95))
    _fill(image, looks.post_x - 1, looks.ground - 38, looks.post_x + 1, looks.ground + 2, _rgb(0.6, 0.1, 0.22))
    return image


def _draw_frame(image: Image, scene: Scene, t: int, clutter: NDArray[np.float64]) -> None:
    looks, x = scene.looks, scene.x[t]
    if looks.night:
        image *= np.array([0.42, 0.45, 0.58], np.float32)  # darker and bluish
    light = np.float32(0.62 if looks.night else 1.0)
    # The door is open once the person has gone inside, and in the frame before.
    if scene.facts.exits == "door" and (np.isnan(x) or t + 1 < FRAMES and np.isnan(scene.x[t + 1])):
        left, right, top = looks.door_x - DOOR_HALF, looks.door_x + DOOR_HALF, looks.ground - DOOR_HEIGHT
        _fill(image, left, top, right, looks.ground, _rgb(0.1, 0.3, 0.08))
    _draw_lamp(image, looks, scene.lamp_on[t])
    if scene.cluttered:
        shirt, trousers = _rgb(clutter[1], 0.6, 0.6) * light, _rgb(clutter[2], 0.4, 0.3) * light
        _person(image, 10 + 76 * clutter[0], looks.ground + 1, 15, shirt, trousers, None)
    if scene.parcel_at_door[t]:
        _parcel(image, looks.door_x + looks.parcel_side * (DOOR_HALF + 6), looks.ground + 6, looks, light)
    if not np.isnan(x):
        _actor(image, scene, t, x, light)
    if scene.cluttered:
        passing = -10 + 120 * ((clutter[3] + t / FRAMES * (1 if clutter[4] < 0.5 else -1)) % 1.0)
        _fill(image, passing - 4, looks.ground + 9, passing + 4, looks.ground + 13, _rgb(clutter[5], 0.5, 0.4) * light)
        _fill(image, 96 * clutter[6] - 2, 10, 96 * clutter[6] + 2, HEIGHT, _rgb(0.3, 0.5, 0.2) * light)


def _draw_lamp(image: Image, looks: Looks, on: bool) -> None:
    top = looks.ground - 44
    if on:
        glow = image[max(top - 7, 0) : top + 14, max(looks.post_x - 10, 0) : looks.post_x + 10]
        glow += (_rgb(0.14, 0.5, 1.0) - glow) * np.float32(0.42)
    bulb = _rgb(0.14, 0.25, 1.0) if on else _rgb(0.6, 0.2, 0.16)
    _fill(image, looks.post_x - 4, top, looks.post_x + 4, top + 7, bulb)


def _parcel(image: Image, x: float, bottom: float, looks: Looks, light: np.float32) -> None:
    colour = _rgb(*looks.parcel) * light
    left, right, top = x - PARCEL_HALF, x + PARCEL_HALF, bottom - PARCEL_HEIGHT
    _fill(image, left - 1, top - 1, right + 1, bottom + 1, colour * np.float32(0.35))
    _fill(image, left, top, right, bottom, colour)
    _fill(image, x - 1, top, x + 1, bottom, np.minimum(colour * np.float32(1.45) + 25, 255))


def _actor(image: Image, scene: Scene, t: int, x: float, light: np.float32) -> None:
    looks = scene.looks
    feet = looks.ground + 4
    shirt, trousers = _rgb(looks.clothing, 0.8, 0.85) * light, _rgb(looks.trousers, 0.45, 0.35) * light
    if scene.lying[t]:
        _lying(image, x, feet, looks.person, shirt, trousers, light)
        if scene.carrying[t]:
            _parcel(image, x, feet - looks.person * 0.3, looks, light)
        return
    _person(image, x, feet, looks.person, shirt, trousers, t)
    if looks.pattern:
        top, bottom = round(feet - looks.person * 0.74), round(feet - looks.person * 0.4)
        left, right = max(round(x - looks.person * 0.16), 0), max(round(x + looks.person * 0.16), 0)
        image[max(top, 0) : bottom : 2, left:right] *= np.float32(0.45)
    if scene.carrying[t]:
        behind, ahead = scene.x[max(t - 1, 0)], scene.x[min(t + 1, FRAMES - 1)]
        facing = np.nan_to_num(ahead, nan=x) - np.nan_to_num(behind, nan=x)
        side = 1.0 if facing >= 0 else -1.0
        _parcel(image, x + side * (looks.person * 0.16 + 3), feet - looks.person * 0.36, looks, light)


def _person(image: Image, x: float, feet: float, height: float, shirt: Colour, trousers: Colour, t: int | None) -> None:
    half = height * 0.16
    stride = 0.0 if t is None else (1.5 if t % 2 else -0.5)
    _fill(image, x - half, feet - height * 0.42, x - half * 0.1 - stride * 0.3, feet, trousers)
    _fill(image, x + half * 0.1 + stride * 0.3, feet - height * 0.42, x + half, feet, trousers)
    _fill(image, x - half, feet - height * 0.78, x + half, feet - height * 0.38, shirt)
    skin = _rgb(0.07, 0.4, 0.85) * (shirt.max() / 217)
    _fill(image, x - half * 0.7, feet - height, x + half * 0.7, feet - height * 0.78, skin)


def _lying(
    image: Image, x: float, feet: float, height: float, shirt: Colour, trousers: Colour, light: np.float32
) -> None:
    thick = height * 0.3
    _fill(image, x - height * 0.5, feet - thick, x - height * 0.08, feet, trousers)
    _fill(image, x - height * 0.08, feet - thick, x + height * 0.3, feet, shirt)
    _fill(image, x + height * 0.3, feet - thick * 0.8, x + height * 0.5, feet, _rgb(0.07, 0.4, 0.85) * light)


def _sense(frames: Image, scene: Scene, rng: np.random.Generator, clutter: NDArray[np.float64]) -> Frames:
    sensor = scene.sensor
    if scene.cluttered:
        frames = _reframe(frames, zoom=1 + 0.12 * clutter[8], shear=0.16 * (clutter[9] - 0.5))
    if sensor.jitter:
        shifts = rng.integers(-sensor.jitter, sensor.jitter + 1, size=(FRAMES, 2))
        for t, (dy, dx) in enumerate(shifts):
            frames[t] = np.roll(frames[t], (int(dy), int(dx)), axis=(0, 1))
    # Uniform noise on -128..127 has a standard deviation of 128 / sqrt(3); cheaper than normal noise.
    grain = rng.integers(-128, 128, size=frames.shape, dtype=np.int8).astype(np.float32)
    frames = frames * np.float32(sensor.gain) + grain * np.float32(sensor.noise * np.sqrt(3) / 128)
    return frames.clip(0, 255).astype(np.uint8)


def _reframe(frames: Image, zoom: float, shear: float) -> Image:
    """Zooms about the centre and shears horizontally, with nearest-neighbour sampling."""
    rows = (np.arange(HEIGHT) - HEIGHT / 2) / zoom + HEIGHT / 2
    columns = (np.arange(WIDTH) - WIDTH / 2) / zoom + WIDTH / 2
    y = rows.round().astype(int).clip(0, HEIGHT - 1)[:, None]
    x = (columns[None, :] + shear * (rows[:, None] - HEIGHT / 2)).round().astype(int).clip(0, WIDTH - 1)
    moved: Image = frames[:, y, x]
    return moved
