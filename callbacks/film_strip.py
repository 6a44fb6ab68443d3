"""Pictures of clips for TensorBoard and the demo: a few frames side by side, as [3, H, W] uint8."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vidreason.datamodules.clips.decoded import DecodeError
from vidreason.datamodules.clips.decoding import FrameOptions
from vidreason.datamodules.clips.reading import read_frames
from vidreason.datamodules.clips.sampling import Stretch

STRIP_FRAMES = 6
STRIP_HEIGHT = 128
STRIP_GAP = 4
CAPTION_HEIGHT = 16


def film_strip(path: Path, stretch: Stretch | None = None) -> Tensor | None:
    """Draws frames of a clip side by side.

    Args:
        path: The file.
        stretch: The part of the video that is drawn; None is all of it.

    Returns:
        [3, H, W] uint8, or None if the clip cannot be read.
    """
    try:
        frames = read_frames(path, FrameOptions(num_frames=STRIP_FRAMES), stretch=stretch).frames
    except DecodeError:
        return None
    width = max(round(frames.shape[3] * STRIP_HEIGHT / frames.shape[2]), 1)
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((width, STRIP_HEIGHT)) for frame in frames]
    strip = Image.new("RGB", ((width + STRIP_GAP) * len(images) - STRIP_GAP, STRIP_HEIGHT), "white")
    for position, image in enumerate(images):
        strip.paste(image, (position * (width + STRIP_GAP), 0))
    return _pixels(strip)


def captioned_strips(strips: Sequence[tuple[str, Tensor]]) -> Tensor:
    """Stacks strips, each below its caption.

    Args:
        strips: At least one pair of caption and picture [3, H, W].

    Returns:
        One picture [3, H, W] uint8.
    """
    width = max(strip.shape[2] for _, strip in strips)
    height = sum(strip.shape[1] + CAPTION_HEIGHT for _, strip in strips)
    sheet = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for caption, strip in strips:
        draw.text((2, top + 2), caption, fill="black")
        sheet.paste(Image.fromarray(strip.permute(1, 2, 0).numpy()), (0, top + CAPTION_HEIGHT))
        top += CAPTION_HEIGHT + strip.shape[1]
    return _pixels(sheet)


def _pixels(image: Image.Image) -> Tensor:
    # PIL's buffer is read-only, for which torch.from_numpy warns
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
