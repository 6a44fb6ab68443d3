"""Clips that a client sends: what they are, by their content, and the temporary files that hold them.

Neither a name, a path, a URL nor a declared type of the client's is used: a file gets a random name and the suffix of
its content. Formats that refer to other files, such as playlists, are not accepted.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import secrets
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from vidreason.serving.errors import ApiError
from vidreason.serving.limits import Budget

_PREFIX = "vidreason-serve-"
_DATA_URL = re.compile(r"data:[^,;]{0,100}(?:;[^,;]{0,100}){0,8}?;base64,", re.IGNORECASE)
_PICTURES = (".jpg", ".png", ".webp")
_ANIMATED = ".anim"  # an animated WebP
_MOST_FRAMES = 1024
_ANY_TIME = (1980, 1, 1, 0, 0, 0)  # equal frames make equal archives

Where = tuple[str | int, ...]


class Media(NamedTuple):
    """The content of one uploaded file."""

    content: bytes
    kind: Literal["video", "picture"]
    suffix: str


def read_media(content: bytes, where: Where = ()) -> Media:
    """Returns content with its kind.

    Args:
        content: Bytes of a file.
        where: Its place in the request, for the message.

    Raises:
        ApiError: If it begins like no known format (415).
    """
    found = _format_of(content)
    if found is None:
        raise ApiError(
            415,
            "neither a video (MP4, MOV, WebM, Matroska, AVI, MPEG, FLV, Ogg, GIF) nor a picture (JPEG, PNG, WebP)",
            where,
            "unsupported_media",
        )
    return Media(content, "picture" if found in _PICTURES else "video", found)


def _format_of(content: bytes) -> str | None:
    """Returns the suffix for content by its first bytes; None if they are of no format that is accepted."""
    begins: dict[bytes, str] = {
        b"\xff\xd8\xff": ".jpg",
        b"\x89PNG\r\n\x1a\n": ".png",
        b"GIF87a": ".gif",
        b"GIF89a": ".gif",
        b"\x1aE\xdf\xa3": ".mkv",
        b"\x00\x00\x01\xba": ".mpg",
        b"\x00\x00\x01\xb3": ".mpg",
        b"FLV\x01": ".flv",
        b"OggS": ".ogv",
    }
    if content[:4] == b"RIFF":
        animated = b"ANIM" in content[12:64]
        return {b"AVI ": ".avi", b"WEBP": _ANIMATED if animated else ".webp"}.get(content[8:12])
    if content[4:8] in (b"ftyp", b"moov", b"wide", b"mdat", b"skip", b"free"):
        return ".mp4"
    if len(content) > 376 and content[0] == content[188] == content[376] == 0x47:
        return ".ts"
    return next((suffix for start, suffix in begins.items() if content.startswith(start)), None)


def decode_base64(text: str, where: Where, status: int) -> bytes:
    """Returns the bytes of base64 text.

    Raises:
        ApiError: If it is none.
    """
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(status, f"{'.'.join(map(str, where))} is not valid base64", where) from error


def from_data_url(url: str, where: Where, status: int) -> bytes:
    """Returns the content of a data URL; no other URL is opened.

    Raises:
        ApiError: If it is another URL, or damaged.
    """
    found = _DATA_URL.match(url)
    if found is None:
        what = "a data URL without ;base64" if url[:5].lower() == "data:" else "no data URL"
        raise ApiError(
            status,
            f"{'.'.join(map(str, where))} is {what}: this service opens no address; send the content itself as "
            "data:video/mp4;base64,...",
            where,
            "unsupported_url",
        )
    return decode_base64(url[found.end() :], where, status)


def one_clip(media: Sequence[Media], status: int) -> Media:
    """Returns the clip that a request sends: one video, or pictures as its frames, in order.

    Pictures become an archive, which the decoder reads picture by picture.

    Raises:
        ApiError: If there is none, or more than one video, or both.
    """
    videos = [item for item in media if item.kind == "video"]
    if not media:
        raise ApiError(
            status, "the request has no clip: send one video, or pictures as its frames", code="missing_clip"
        )
    if len(videos) > 1 or (videos and len(media) > 1):
        raise ApiError(status, "the request has several clips: send one video, or pictures as the frames of one")
    if videos:
        return videos[0]
    if len(media) > _MOST_FRAMES:
        raise ApiError(status, f"the request has {len(media)} frames, more than {_MOST_FRAMES}")
    with tempfile.SpooledTemporaryFile(max_size=2**40) as file:  # in memory
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for number, item in enumerate(media):
                archive.writestr(zipfile.ZipInfo(f"{number:06}{item.suffix}", _ANY_TIME), item.content)
        file.seek(0)
        return Media(file.read(), "picture", ".zip")


class Uploads:
    """A temporary folder for the clips of requests.

    Args:
        budget: Takes the bytes of the files in it.
    """

    def __init__(self, budget: Budget) -> None:
        _remove_those_of_dead_processes()
        self.budget = budget
        self.folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))

    @contextmanager
    def file(self, media: Media) -> Iterator[Path]:
        """Yields the path of a file with the content of a clip, which is removed at the end of the block.

        Raises:
            ApiError: If the folder is full (503).
        """
        path = self.folder / f"{secrets.token_hex(16)}{media.suffix}"
        with self.budget.lease() as lease:
            lease.grow(len(media.content))
            try:
                path.write_bytes(media.content)
                yield path
            except OSError as error:
                if error.filename is not None and Path(os.fsdecode(error.filename)) == path:
                    raise ApiError(503, "the service cannot write the clip to its disk", retry_after=10) from error
                raise
            finally:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _remove_those_of_dead_processes() -> None:
    """Removes the folders of services that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if not pid.isdecimal() or folder.is_symlink():
            continue
        with suppress(OSError):
            if folder.stat().st_uid == os.getuid() and not _alive(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
