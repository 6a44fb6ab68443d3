"""Reads clips that are pictures: in a zip archive (which is not unpacked to disk), in a folder, or an animated WebP."""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from PIL import Image, ImageSequence

from vidreason.datamodules.clips.decoded import (
    NOMINAL_FPS,
    DecodedFrames,
    DecodeError,
    Pixels,
    check_frame_size,
    first_line,
    fit_size,
    resize,
)
from vidreason.datamodules.clips.sampling import FrameChooser, choose_by_time

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"})
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # Pillow opens EPS, too, by running Ghostscript
_PICTURE_ERRORS = (OSError, SyntaxError, RuntimeError, zipfile.BadZipFile, zlib.error, ValueError)
_MAX_ARCHIVE_BYTES = 2 * 10**9
_MAX_EXPANSION = 100
_MAX_PICTURE_BYTES = 256 * 10**6  # an encoded picture; 64 megapixels without compression are 192 MB


@dataclass(frozen=True)
class _Pictures:
    """Pictures that can be read one by one."""

    names: tuple[str, ...]
    """Names of the pictures, in natural order (``2.png`` before ``10.png``)."""
    read: Callable[[str], bytes]


def open_picture(file: Path | IO[bytes]) -> Image.Image:
    """Opens a picture of a common format by its content: JPEG, PNG, WebP, GIF, BMP, TIFF or PPM.

    Raises:
        OSError: If it is of no such format, whatever its name says.
    """
    return Image.open(file, formats=_FORMATS)


def read_pictures(path: Path, choose: FrameChooser, max_pixels: int | None) -> DecodedFrames:
    """Reads the chosen pictures of an archive or folder, in the natural order of their names (``f_2`` before ``f_10``).

    Unreadable pictures are left out, and the others are chosen from again. All are resized to the first one's size.

    Raises:
        DecodeError: If the archive is incomplete or expands to too much, a picture is too large, or none is readable.
    """
    try:
        if path.is_dir():
            return _read(_Pictures(tuple(pictures_in(path)), lambda name: _file(path / name)), choose, max_pixels)
        with zipfile.ZipFile(path) as archive:
            _check_expansion(archive, path)
            names = picture_names(archive.namelist())
            return _read(_Pictures(tuple(names), lambda name: _entry(archive, name)), choose, max_pixels)
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise DecodeError(f"{path}: not a readable zip archive: {error}") from error
    except DecodeError as error:
        raise DecodeError(f"{path}: {error}") from error


def read_animation(path: Path, choose: FrameChooser, max_pixels: int | None) -> DecodedFrames:
    """Reads the chosen frames of an animated picture that FFmpeg cannot read, such as WebP.

    Raises:
        DecodeError: If it is no animated picture.
    """
    try:
        with open_picture(path) as image:
            size = image.size
            check_frame_size(*size)
            total = int(getattr(image, "n_frames", 1))
            if total < 2:
                raise DecodeError("a single picture")
            durations = [float(frame.info.get("duration") or 40) / 1000 for frame in ImageSequence.Iterator(image)]
            times = np.concatenate([[0.0], np.cumsum(durations[:-1])]).tolist()
            shown = choose_by_time(choose, times, total / sum(durations))
            kept: dict[int, Pixels] = {}
            for index in sorted(set(shown.frames)):
                image.seek(index)
                pixels = np.asarray(image.convert("RGB"))
                kept[index] = resize(pixels, fit_size(pixels.shape[0], pixels.shape[1], max_pixels))
    except _PICTURE_ERRORS as error:
        raise DecodeError(f"{path}: Pillow: {first_line(error)}") from error
    pixels = np.stack([kept[index] for index in shown.frames])
    why = "FFmpeg does not read animated WebP"
    return DecodedFrames(pixels, shown.fps, shown.total, shown.moments, total, "pictures", why=why, size=size)


def is_picture_folder(path: Path) -> bool:
    """Returns whether a path is a folder that holds pictures, which make a clip."""
    return path.is_dir() and bool(pictures_in(path))


def pictures_in(folder: Path) -> list[str]:
    """Returns the names of the pictures directly in a folder, in natural order."""
    return picture_names([path.name for path in folder.iterdir() if path.is_file()])


def picture_names(names: Sequence[str]) -> list[str]:
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


def _check_expansion(archive: zipfile.ZipFile, path: Path) -> None:
    """Checks the sizes in the archive's directory; no entry yields more bytes than its size there."""
    size = sum(entry.file_size for entry in archive.infolist())
    packed = path.stat().st_size
    if size > _MAX_ARCHIVE_BYTES or size > _MAX_EXPANSION * packed:
        raise DecodeError(
            f"the archive of {packed} bytes expands to {size}, more than 2 GB or {_MAX_EXPANSION} times its size; "
            "store the pictures as JPEG or PNG"
        )


def _read(source: _Pictures, choose: FrameChooser, max_pixels: int | None) -> DecodedFrames:
    names = source.names
    read: dict[str, Pixels] = {}
    first: tuple[int, int] | None = None
    while names:
        indices = choose(len(names), NOMINAL_FPS)
        bad = set()
        for name in (names[index] for index in sorted(set(indices))):
            if name in read:
                continue
            picture = _picture(source, name)
            if picture is None:
                bad.add(name)
                continue
            first = first or (picture.shape[1], picture.shape[0])
            read[name] = resize(picture, fit_size(first[1], first[0], max_pixels))
        if not bad and first is not None:
            pixels = np.stack([read[names[index]] for index in indices])
            total = len(names)
            partial = total < len(source.names)
            return DecodedFrames(pixels, NOMINAL_FPS, total, indices, total, "pictures", partial, size=first)
        names = tuple(name for name in names if name not in bad)
    raise DecodeError(f"no readable picture among {len(source.names)}; store the pictures as JPEG or PNG")


def _picture(source: _Pictures, name: str) -> Pixels | None:
    """Returns a picture [H, W, 3]; None if it cannot be read.

    Raises:
        DecodeError: If it is too large to be decoded.
    """
    try:
        content = source.read(name)
        with open_picture(io.BytesIO(content)) as image:
            check_frame_size(*image.size)
            return np.asarray(image.convert("RGB"))
    except (DecodeError, Image.DecompressionBombError) as error:
        raise DecodeError(f"{name}: {error}") from error
    except _PICTURE_ERRORS:
        return None


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    _check_encoded_size(archive.getinfo(name).file_size)
    return archive.read(name)


def _file(path: Path) -> bytes:
    _check_encoded_size(path.stat().st_size)
    return path.read_bytes()


def _check_encoded_size(size: int) -> None:
    if size > _MAX_PICTURE_BYTES:
        raise OSError(f"an encoded picture of {size} bytes")


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Returns a sort key that compares runs of digits as numbers."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part.casefold()) for part in parts]
