"""Reads clips stored as zip archives of pictures, without unpacking them to disk."""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"})
_PICTURE_ERRORS = (OSError, SyntaxError, RuntimeError, zipfile.BadZipFile, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Pictures:
    """The sampled pictures of an archive."""

    pictures: tuple[Tensor, ...]
    """[T] of uint8 [3, H, W]; sizes may differ"""
    indices: tuple[int, ...]
    """[T] indices among the readable pictures"""
    total: int
    partial: bool
    """True if some pictures could not be read and were skipped"""


def read_pictures(path: Path, choose: Callable[[int], tuple[int, ...]]) -> Pictures:
    """Reads the chosen pictures of an archive, in the natural order of their names (``f_2`` before ``f_10``).

    Args:
        path: The archive.
        choose: Maps the number of pictures to the positions to take; called again if a chosen picture is unreadable.

    Raises:
        ValueError: If the archive is incomplete or has no readable picture.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, picture_names(archive.namelist()), choose)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"not a readable zip archive: {error}") from error


def picture_names(names: list[str]) -> list[str]:
    """Returns the pictures among an archive's entries in natural order, without hidden and system files.

    Example:
        >>> picture_names(["a/f_10.jpg", "a/f_2.jpg", "__MACOSX/a/f_2.jpg", "a/.hidden.jpg", "notes.txt"])
        ['a/f_2.jpg', 'a/f_10.jpg']
    """
    kept = []
    for name in names:
        parts = PurePosixPath(name).parts
        hidden = any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in parts)
        if not hidden and PurePosixPath(name).suffix.lower() in _SUFFIXES and not name.endswith("/"):
            kept.append(name)
    return sorted(kept, key=_natural)


def _read(archive: zipfile.ZipFile, names: list[str], choose: Callable[[int], tuple[int, ...]]) -> Pictures:
    found = len(names)
    read: dict[str, Tensor] = {}
    while names:
        indices = choose(len(names))
        bad = []
        for name in {names[index] for index in indices} - read.keys():
            picture = _picture(archive, name)
            if picture is None:
                bad.append(name)
            else:
                read[name] = picture
        if not bad:
            return Pictures(tuple(read[names[i]] for i in indices), indices, len(names), len(names) < found)
        names = [name for name in names if name not in bad]
    raise ValueError(f"no readable picture among {found}")


def _picture(archive: zipfile.ZipFile, name: str) -> Tensor | None:
    try:
        with Image.open(io.BytesIO(archive.read(name))) as image:
            pixels = np.array(image.convert("RGB"))
    except _PICTURE_ERRORS:
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Returns a sort key that compares runs of digits as numbers."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part.casefold()) for part in parts]
