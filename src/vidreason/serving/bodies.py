"""Bodies of requests: read, decompressed and parsed within limits of bytes, time and structure."""

from __future__ import annotations

import asyncio
import json
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from vidreason.serving.errors import ApiError
from vidreason.serving.limits import MB, Lease, ServingOptions

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_PIECE = MB  # bytes that are decompressed at once
_MOST_MARKS = 1_000_000  # commas, colons and brackets of a JSON body; each value takes some 100 bytes of memory
_JSON_COPIES = 3  # a body as bytes, as text and as decoded base64
_MOST_PARTS = 16
_DISCARD_S = 10.0
_ZSTD_WINDOW = 27  # log2 of the largest window, 128 MiB: what a decoder is asked to support is 8 MiB


class _Decoder(Protocol):
    def decompress(self, data: bytes, max_length: int) -> bytes: ...

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...


@dataclass
class Part:
    """A part of a multipart body."""

    name: str
    content: bytearray = field(default_factory=bytearray)


async def read_body(request: Request, options: ServingOptions, lease: Lease) -> bytes:
    """Reads the whole body of a request, without its Content-Encoding.

    Args:
        request: The request.
        options: Limits.
        lease: Takes the bytes that parsing the body needs.

    Raises:
        ApiError: 408, 413, 415 or 503.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    inflate = _inflater(encoding, options.max_body)
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told) > options.max_body:
        raise _too_large(options)
    body, received = bytearray(), 0
    try:
        async with asyncio.timeout(options.upload_s):
            async for chunk in request.stream():
                received += len(chunk)
                if received > options.max_body:
                    raise _too_large(options)
                lease.grow(_JSON_COPIES * len(chunk))
                if inflate is None:
                    body += chunk
                    continue
                # decompression of a piece takes milliseconds, and all of a body a second
                more = await asyncio.to_thread(inflate, chunk)
                lease.grow(_JSON_COPIES * len(more))
                body += more
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {options.upload_s:g} seconds") from error
    if inflate is not None:
        await asyncio.to_thread(inflate, b"", True)
    return bytes(body)


async def discard(request: Request, limit: int) -> None:
    """Reads and forgets what is left of a body, so that its sender gets the answer instead of a broken connection."""
    received = 0
    try:
        async with asyncio.timeout(_DISCARD_S):
            async for chunk in request.stream():
                received += len(chunk)
                if received > limit:
                    return
    except (TimeoutError, RuntimeError, ClientDisconnect):  # RuntimeError if it was read already
        return


def _too_large(options: ServingOptions) -> ApiError:
    return ApiError(413, f"the body is larger than {options.max_body // MB} MiB", code="body_too_large")


def _inflater(encoding: str, limit: int) -> Callable[..., bytes] | None:
    """Returns a function from compressed to plain pieces, or None if a body is not compressed."""
    if encoding in ("", "identity"):
        return None
    makers: dict[str, Callable[[], _Decoder]] = {
        "gzip": lambda: _ZlibDecoder(31),
        "x-gzip": lambda: _ZlibDecoder(31),
        "deflate": lambda: _ZlibDecoder(15),
        "zstd": lambda: zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW}),
    }
    if encoding not in makers:
        raise ApiError(415, f"Content-Encoding {encoding[:40]!r} is none of identity, gzip, deflate and zstd")
    decoder, total = makers[encoding](), 0

    def inflate(data: bytes, last: bool = False) -> bytes:
        nonlocal total
        made = bytearray()
        try:
            behind = bool(data) and decoder.eof
            while not last and not decoder.eof:
                piece = decoder.decompress(data, _PIECE)
                data = b""
                made += piece
                total += len(piece)
                if total > limit:
                    raise ApiError(413, f"the body is larger than {limit // MB} MiB", code="body_too_large")
                if len(piece) < _PIECE:
                    break
        except (zlib.error, zstd.ZstdError, EOFError, ValueError) as error:
            raise ApiError(400, f"the body is not valid {encoding}") from error
        if behind or decoder.unused_data:
            raise ApiError(400, f"there are bytes behind the end of the {encoding} body")
        if last and not decoder.eof:
            raise ApiError(400, f"the {encoding} body is incomplete")
        return bytes(made)

    return inflate


class _ZlibDecoder:
    """A zlib decoder that keeps its unused input, as that of zstd does."""

    def __init__(self, bits: int) -> None:
        self._decoder = zlib.decompressobj(bits)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)


def parse_json(body: bytes, status: int) -> Any:
    """Returns the value of a JSON body.

    Args:
        body: The body.
        status: Status of the error for a body that is no JSON.

    Raises:
        ApiError: If it is no JSON, or has too many values.
    """
    marks = sum(body.count(mark) for mark in (b",", b":", b"[", b"{"))
    if marks > _MOST_MARKS:
        raise ApiError(413, f"the JSON body has more than {_MOST_MARKS} values", code="body_too_large")
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        what = "nested too deeply" if isinstance(error, RecursionError) else "not valid JSON in UTF-8"
        raise ApiError(status, f"the body is {what}", code="json_invalid") from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def parse_multipart(body: bytes, content_type: str, status: int) -> Mapping[str, Part]:
    """Returns the parts of a multipart body by name; names of files are not looked at.

    Args:
        body: The body.
        content_type: Its Content-Type, which has the boundary.
        status: Status of the error for a body that is no multipart body.

    Raises:
        ApiError: If it is damaged, or a name is missing or occurs twice.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    parts: list[Part] = []
    header: dict[str, bytes] = {}
    name, value = bytearray(), bytearray()

    def end_header() -> None:
        header[bytes(name).decode("latin-1").lower()] = bytes(value)
        name.clear()
        value.clear()

    def headers_finished() -> None:
        options = parse_options_header(header.get("content-disposition", b""))[1]
        parts[-1].name = options.get(b"name", b"").decode("utf-8", "replace")

    def begin() -> None:
        if len(parts) == _MOST_PARTS:
            raise FormParserError(f"more than {_MOST_PARTS} parts")
        header.clear()
        parts.append(Part(""))

    ended: list[bool] = []
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": begin,
                "on_part_data": lambda data, start, end: parts[-1].content.extend(memoryview(data)[start:end]),
                "on_header_field": lambda data, start, end: name.extend(data[start:end]),
                "on_header_value": lambda data, start, end: value.extend(data[start:end]),
                "on_header_end": end_header,
                "on_headers_finished": headers_finished,
                "on_end": lambda: ended.append(True),
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise ApiError(status, f"the multipart body is damaged: {str(error)[:200]}") from error
    found = {part.name: part for part in parts}
    if not ended:
        raise ApiError(status, "the multipart body is incomplete: its last boundary is missing")
    if not parts or len(found) < len(parts) or "" in found:
        raise ApiError(status, "the multipart body needs parts with a different name each")
    return found
