"""Limits of bodies, memory, time and callers, and the end of the service."""

import asyncio
import gzip
import io
import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import served_model as world
from backports import zstd
from fastapi import Request

from vidreason.answering.loaded import LoadedModel
from vidreason.serving.bodies import parse_json, parse_multipart, read_body
from vidreason.serving.engine import Engine
from vidreason.serving.errors import ApiError
from vidreason.serving.guard import read_token
from vidreason.serving.limits import MB, Budget, ServingOptions
from vidreason.serving.media import Uploads, read_media
from vidreason.serving.server import Address
from vidreason.serving.service import Service

SMALL = ServingOptions(max_body=MB)
COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress, "zstd": zstd.compress}


def read(chunks: list[bytes], options: ServingOptions = SMALL, budget: Budget | None = None, **headers: str) -> bytes:
    """Returns what ``read_body`` makes of a body that arrives in chunks."""
    waiting = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages = iter([*waiting, {"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> dict:
        return next(messages)

    scope = {"type": "http", "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]}
    with (budget or Budget(100 * MB, "memory")).lease() as lease:
        return asyncio.run(read_body(Request(scope, receive), options, lease))


@pytest.mark.parametrize("encoding", COMPRESS)
def test_bodies_are_decompressed_within_the_limit(encoding: str):
    plain = bytes(range(256)) * 4096  # as large as the limit
    sent = COMPRESS[encoding](plain)
    pieces = [sent[start : start + 1000] for start in range(0, len(sent), 1000)]
    assert read(pieces, content_encoding=encoding) == plain
    for body, status in (
        (COMPRESS[encoding](bytes(3 * MB)), 413),
        (sent[:-5], 400),
        (sent + b"more", 400),
        (b"not compressed", 400),
    ):
        with pytest.raises(ApiError) as caught:
            read([body], content_encoding=encoding)
        assert caught.value.status == status


@pytest.mark.parametrize(
    ("headers", "chunks", "status"),
    [
        ({"content_length": str(2 * MB)}, [], 413),
        ({}, [bytes(MB), b"1"], 413),
        ({"content_encoding": "br"}, [b"1"], 415),
        ({"content_encoding": "gzip, gzip"}, [b"1"], 415),
    ],
)
def test_what_cannot_be_read_is_refused(headers: dict, chunks: list[bytes], status: int):
    with pytest.raises(ApiError) as caught:
        read(chunks, **headers)
    assert caught.value.status == status


def test_bodies_share_one_budget_and_give_it_back():
    budget = Budget(4 * MB, "memory")
    assert read([bytes(MB)], budget=budget) == bytes(MB)
    assert budget.used == 0
    with budget.lease() as other:
        other.grow(2 * MB)
        with pytest.raises(ApiError) as caught:
            read([bytes(MB)], budget=budget)
        assert (caught.value.status, caught.value.retry_after) == (503, 2)
    assert budget.used == 0


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a": NaN}', b'"\xff"', b"", b"1" * 5000, b'{"a": 1'])
def test_what_is_no_json_is_refused(body: bytes):
    with pytest.raises(ApiError) as caught:
        parse_json(body, 400)
    assert caught.value.status == 400


def test_json_of_many_small_values_is_refused():
    """Three bytes of text become a list of 60 bytes."""
    with pytest.raises(ApiError) as caught:
        parse_json(b"[" + b"[]," * 2_000_000 + b"1]", 400)
    assert caught.value.status == 413


def test_parts_of_a_multipart_body_are_told_apart():
    content_type = "multipart/form-data; boundary=x"

    def body(*names: str, end: str = "--") -> bytes:
        parts = [
            f'--x\r\nContent-Disposition: form-data; name="{n}"; filename="../../{n}"\r\n\r\n{n}!\r\n' for n in names
        ]
        return ("".join(parts) + f"--x{end}\r\n").encode()

    parts = parse_multipart(body("a", "b"), content_type, 400)
    assert {name: bytes(part.content) for name, part in parts.items()} == {"a": b"a!", "b": b"b!"}
    for wrong in (body("a", "a"), body(""), body("a", end=""), body(*map(str, range(17))), b"", b"--y", body()):
        with pytest.raises(ApiError) as caught:
            parse_multipart(wrong, content_type, 422)
        assert caught.value.status == 422


@pytest.mark.parametrize(
    "content", [b"#EXTM3U\nfile:///etc/passwd", b"ffconcat version 1.0\n", b"PK\x03\x04", b"%!PS", b""]
)
def test_formats_that_refer_to_files_are_not_accepted(content: bytes):
    with pytest.raises(ApiError) as caught:
        read_media(content)
    assert caught.value.status == 415


def test_uploads_have_names_of_ours_and_go(clips: list[bytes]):
    budget = Budget(len(clips[0]), "folder")
    uploads = Uploads(budget)
    with uploads.file(read_media(clips[0])) as path:
        assert (path.parent, path.suffix, path.read_bytes()) == (uploads.folder, ".mp4", clips[0])
        assert uploads.folder.stat().st_mode & 0o077 == 0
        with pytest.raises(ApiError, match="full"), uploads.file(read_media(clips[0])):
            pass
    assert (list(uploads.folder.iterdir()), budget.used) == ([], 0)
    uploads.close()
    assert not uploads.folder.exists()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:1"}, 200),
        ({"host": "LOCALHOST"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "example.org"}, 403),
        ({"host": "127.0.0.1.example.org"}, 403),
        ({"host": "[::1].example.org"}, 403),
        ({"host": "example.org", "x_forwarded_host": "localhost"}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:9000"}, 403),
        ({"host": "localhost:8000", "origin": "http://example.org"}, 403),
        ({"origin": "null"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
    ],
)
def test_pages_of_other_sites_cannot_call(port: int, headers: dict, status: int):
    assert world.call(port, "/v1/models", **headers).status == status


def test_paths_that_are_not_there_and_methods(port: int):
    assert world.call(port, "/v1/nothing").body["error"]["code"] == "not_found"
    assert world.call(port, "/v1/classify").status == 405
    assert world.call(port, "/../../etc/passwd").status == 404
    page = world.call(port, "/docs")
    assert "POST /v1/systemone" in page.body
    assert "<script" not in page.body
    assert "/v1/decisions" in world.call(port, "/openapi.json").body["paths"]


def test_a_token_is_asked_for_beyond_loopback(tmp_path: Path):
    with pytest.raises(ValueError, match=r"--host 0\.0\.0\.0.*--token-file"):
        Address("0.0.0.0")
    file = tmp_path / "token"
    file.write_text("short\n")
    with pytest.raises(ValueError, match="at least 16"):
        read_token(file)
    file.write_text("a-token-of-24-characters\n")
    assert Address("0.0.0.0", token_file=file).token == "a-token-of-24-characters"
    assert "a-token" not in repr(Address("0.0.0.0", token_file=file))


class SlowEngine(Engine):
    """An engine that waits for permission before each batch, and notes how many requests were in it."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded, 8)
        self.go = threading.Event()
        self.began = threading.Event()
        self.sizes: list[int] = []

    def answer(self, jobs):
        self.sizes.append(len(jobs))
        self.began.set()
        self.go.wait(30)
        return super().answer(jobs)


@pytest.fixture
def slow(loaded: LoadedModel) -> Iterator[SlowEngine]:
    engine = SlowEngine(loaded)
    yield engine
    engine.go.set()


def make(engine: Engine, **options: float) -> Service:
    limits = ServingOptions(**{"decoders": 1, **options})
    return Service(engine, world.About.of(engine, world.NAME, 0.0), limits)


@pytest.mark.slow
def test_a_full_queue_and_a_deadline_tell_when_to_come_back(slow: SlowEngine, clips: list[bytes]):
    service = make(slow, waiting=2, deadline_s=3.0)
    with world.running(service, token="a-token-of-24-characters") as port, ThreadPoolExecutor(2) as threads:
        right = {"authorization": "Bearer a-token-of-24-characters"}
        for wrong in ({}, {"authorization": "Bearer a-token"}, {"authorization": "Basic a-token-of-24-characters"}):
            reply = world.call(port, "/v1/systemone", clips[0], **wrong)
            assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert world.call(port, "/health").status == 200
        slow.go.set()  # until decoders are warm, decoding alone may take longer
        assert any(world.call(port, "/v1/classify", clips[0], **right).status == 200 for _ in range(30))
        slow.go.clear()
        slow.began.clear()
        waiting = [threads.submit(world.call, port, "/v1/classify", clips[n], **right) for n in (0, 1)]
        assert slow.began.wait(20)
        until = time.monotonic() + 20
        while service.active < 2 and time.monotonic() < until:
            time.sleep(0.01)
        reply = world.call(port, "/v1/decisions", clips[2], **right)
        assert (reply.status, reply.body["error"]["type"]) == (429, "rate_limit_error")
        assert int(reply.headers["retry-after"]) >= 1
        replies = [one.result() for one in waiting]
        assert [reply.status for reply in replies] == [503, 503]
        assert all(reply.body["error"]["code"] == "deadline" and "retry-after" in reply.headers for reply in replies)
        slow.go.set()
    assert (service.active, service.memory.used, service.uploads.budget.used) == (0, 0, 0)
    assert not service.uploads.folder.exists()


def test_requests_go_through_the_model_together_and_a_stop_loses_none(slow: SlowEngine, clips: list[bytes]):
    service = make(slow, waiting=16)
    with world.running(service) as port, ThreadPoolExecutor(6) as threads:
        first = threads.submit(world.call, port, "/v1/classify", clips[0])
        assert slow.began.wait(20)
        rest = [threads.submit(world.call, port, "/v1/classify", clips[n % 3]) for n in range(5)]
        until = time.monotonic() + 20
        while service._queue.qsize() < 5 and time.monotonic() < until:
            time.sleep(0.01)
        service.stopping = True
        late = world.call(port, "/v1/classify", clips[0])
        assert (late.status, late.headers["retry-after"], late.body["error"]["code"]) == (503, "5", "stopping")
        assert world.call(port, "/health").body["status"] == "stopping"
        slow.go.set()
        replies = [one.result() for one in (first, *rest)]
    assert [reply.status for reply in replies] == [200] * 6
    assert slow.sizes == [1, 5]
    same = [replies[0].body, replies[4].body]  # the same clip, alone and with four others
    assert same[0]["probabilities"] == pytest.approx(same[1]["probabilities"], abs=1e-5)
    assert same[0]["traces"] == same[1]["traces"]
    assert replies[4].body["timing"]["requests_together"] == 5


def test_a_clip_that_cannot_be_read_names_no_file(port: int, clips: list[bytes], loaded: LoadedModel):
    reply = world.call(port, "/v1/classify", clips[0][:60] + bytes(500))
    assert reply.status == 422
    assert "vidreason-serve" not in json.dumps(reply.body)
    assert "/" not in reply.body["error"]["message"].replace("decord/", "")


def test_classify_says_everything_it_knows(port: int, clips: list[bytes]):
    whole = world.call(port, "/v1/classify?frames=true&samples=3", clips[1]).body
    assert whole["label"] == whole["choice"] in world.TASK.label_names
    assert sum(whole["probabilities"].values()) == pytest.approx(1)
    assert len(whole["traces"]) == 3
    assert whole["calibration"]["applied"]
    assert len(whole["frames"]) == whole["clip"]["frames"] == len(whole["clip"]["times"]) == 4
    assert all(frame.startswith("data:image/jpeg;base64,/9j/") for frame in whole["frames"])
    assert set(whole["timing"]) == {"upload", "decode", "wait", "model", "requests_together"}
    form = io.BytesIO()
    form.write(b'--x\r\nContent-Disposition: form-data; name="clip"; filename="/etc/passwd"\r\n\r\n')
    form.write(clips[1] + b"\r\n--x--\r\n")
    sent = {"content_type": "multipart/form-data; boundary=x"}
    again = world.call(port, "/v1/classify?samples=3", form.getvalue(), **sent).body
    assert again["probabilities"] == pytest.approx(whole["probabilities"])
    assert "frames" not in again
    for query in ("samples=0", "samples=x", "frames=maybe", "samples=1000"):
        assert world.call(port, f"/v1/classify?{query}", clips[1]).status == 400
