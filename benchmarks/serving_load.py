"""The service under many, wrong and interrupted requests: parts of ``serving.py``."""

from __future__ import annotations

import base64
import itertools
import json
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote

from marked_clips import with_mark
from serving_process import Reply, Served, post

PATHS = ("/v1/decisions", "/v1/systemone", "/v1/classify")
TYPES = (
    "application/json",
    "multipart/form-data; boundary=x",
    "video/mp4",
    "multipart/form-data",
    "text/plain",
    "\x7f",
)
ENCODINGS = ("identity", "gzip", "deflate", "zstd", "br", "gzip, gzip")
_WORDS = (b"\xff\xfe", b"\x00" * 9, b"[{", b'"', b"\\ud800", b"1e999", b"\r\n--x", b"null")
_CANARY = "canary-7f3a"


def soak(served: Served, clips: Sequence[Path], requests: int) -> dict[str, object]:
    """Sends many requests, of which a tenth is decided, each about another clip, and watches memory and descriptors."""
    contents = [path.read_bytes() for path in clips]
    statuses: Counter[int] = Counter()
    seen: list[dict[str, float]] = []
    with ThreadPoolExecutor(8) as threads:

        def one(number: int) -> int:
            if number % 10 == 0:
                clip = with_mark(contents[number // 10 % len(contents)], str(number))
                return post(served.port, "/v1/classify?samples=2", clip).status
            path = PATHS[number % 3]
            wrong = (b"{}", b"", b"\x00" * 1000, contents[0][:300], b"[" * 2000)[number % 5]
            return post(served.port, path, wrong, headers={"Content-Type": TYPES[number % 3]}).status

        for start_of in range(0, requests, max(requests // 10, 1)):
            statuses.update(threads.map(one, range(start_of, min(start_of + max(requests // 10, 1), requests))))
            now = {"requests": sum(statuses.values()), "memory_mb": served.memory_mb()}
            seen.append({**now, "descriptors": served.descriptors(), "processes": len(served.processes())})
        left = sum(1 for path in served.temporary.rglob("*") if path.is_file())
    first, last = seen[1 if len(seen) > 2 else 0], seen[-1]
    return {
        "requests": requests,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "memory_growth_mb": last["memory_mb"] - first["memory_mb"],
        "descriptor_growth": last["descriptors"] - first["descriptors"],
        "files_left": left,
        "over_time": seen,
    }


def fuzz(served: Served, name: str, clips: Sequence[Path], mutations: int, seed: int) -> dict[str, object]:
    """Sends changed bodies, headers and files; counts crashes, tracebacks and escapes."""
    rng, statuses, bad = random.Random(seed), Counter[int](), list[str]()
    with _canary(served) as canary:
        valid = _valid(name, clips[0].read_bytes(), canary)
        for number in range(mutations):
            path, headers, body = rng.choice(valid)
            if number % 4:
                body = _mutated(rng, body)
            if number % 3 == 0:
                headers = {**headers, rng.choice(("Content-Type", "Content-Encoding")): rng.choice(TYPES + ENCODINGS)}
            try:
                reply = (
                    _raw(served.port, path, headers, body)
                    if number % 50 == 7
                    else post(served.port, path, body, headers=headers)
                )
            except (HTTPException, OSError, ValueError) as error:
                if served.process.poll() is not None:
                    bad.append(f"request {number}: the service ended, {error!r}")
                    break
                statuses[0] += 1  # the client itself refuses such a header, or the server closes at a broken one
                continue
            statuses[reply.status] += 1
            bad += [f"request {number}: {why}" for why in _faults(path, reply)]
        alive = served.process.poll() is None and post(served.port, "/health", None, "GET").status == 200
        tracebacks = served.log.read_text(errors="replace").count("Traceback")
        left = sum(1 for path in served.temporary.rglob("*") if path.is_file())
        escapes = len(canary.connections) + left
    return {
        "mutations": mutations,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "crashes": 0 if alive else 1,
        "tracebacks": tracebacks,
        "escapes": escapes,
        "faults": bad[:20],
    }


class _Canary:
    """A server and a file that nobody may open."""

    def __init__(self, port: int, file: Path) -> None:
        self.port, self.file = port, file
        self.connections: list[str] = []


@contextmanager
def _canary(served: Served) -> Iterator[_Canary]:
    file = served.log.parent / f"{_CANARY}.mp4"
    file.write_text(_CANARY)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        canary = _Canary(listener.getsockname()[1], file)

        def accept() -> None:
            while True:
                try:
                    connection, address = listener.accept()
                except OSError:
                    return
                canary.connections.append(str(address))
                connection.close()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield canary
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def _valid(name: str, clip: bytes, canary: _Canary) -> list[tuple[str, dict[str, str], bytes]]:
    """Returns requests that are right, and some that name the canary."""
    coded, json_type = base64.b64encode(clip).decode(), {"Content-Type": "application/json"}
    found: list[tuple[str, dict[str, str], bytes]] = [("/v1/classify", {"Content-Type": "video/mp4"}, clip)]
    places = (f"data:video/mp4;base64,{coded}", f"http://127.0.0.1:{canary.port}/a.mp4", f"file://{canary.file}")
    question = {"type": "choice", "instructions": "Is it night?", "choices": [{"value": "yes"}, {"value": "no"}]}
    for place in places:
        part = {"type": "input_video", "video_url": place}
        body = {"model": name, "input": [{"role": "user", "content": [part]}], "questions": [question]}
        found.append(("/v1/decisions", json_type, json.dumps(body).encode()))
    asset = {"type": "video", "format": f"../../{quote(str(canary.file))}", "data_base64": coded}
    one = {"model": name, "state": "v", "assets": {"v": asset}, "questions": {"n": {"type": "noul"}}}
    found.append(("/v1/systemone", json_type, json.dumps(one).encode()))
    playlists = (
        f"#EXTM3U\n#EXTINF:1,\nfile://{canary.file}\n",
        f"ffconcat version 1.0\nfile http://127.0.0.1:{canary.port}/a.mp4\n",
        f"v=0\nc=IN IP4 127.0.0.1\nm=video {canary.port} RTP/AVP 33\n",
    )
    for text in playlists:
        found.append(("/v1/classify", {"Content-Type": "video/mp4"}, text.encode()))
        hidden = b"\x00\x00\x00\x08free\n" + text.encode()
        found.append(("/v1/classify", {"Content-Type": "video/mp4"}, hidden))
    form = (
        b'--x\r\nContent-Disposition: form-data; name="clip"; filename="../../canary"\r\n\r\n' + clip + b"\r\n--x--\r\n"
    )
    found.append(("/v1/classify", {"Content-Type": "multipart/form-data; boundary=x"}, form))
    return found


def _mutated(rng: random.Random, body: bytes) -> bytes:
    """Returns a body with some bytes changed, cut out, doubled or put in."""
    made = bytearray(body)
    for _ in range(rng.choice((1, 2, 8, 64))):
        place = rng.randrange(len(made) + 1)
        kind = rng.randrange(5)
        if kind == 0 and made:
            made[place % len(made)] = rng.randrange(256)
        elif kind == 1:
            made[place:place] = rng.choice(_WORDS)
        elif kind == 2:
            del made[place : place + rng.randrange(1, 40)]
        elif kind == 3:
            made[place:place] = made[place : place + rng.randrange(1, 400)]
        else:
            del made[place if rng.random() < 0.1 else len(made) :]
    return bytes(made)


def _raw(port: int, path: str, headers: dict[str, str], body: bytes) -> Reply:
    """Sends a request whose length, lines or end are wrong."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body) // 2}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1") + body)
        answer = connection.recv(64).decode("latin-1").split(" ")
    return Reply(int(answer[1]) if len(answer) > 1 else 400, {}, b"")


def _faults(path: str, reply: Reply) -> list[str]:
    """Returns what is wrong with a response."""
    found = [f"status {reply.status}"] if reply.status >= 500 and reply.status != 503 else []
    if reply.status in (429, 503) and reply.headers and "retry-after" not in reply.headers:
        found.append("no Retry-After")
    if _CANARY.encode() in reply.body or b"served-" in reply.body or b"vidreason-serve" in reply.body:
        found.append("tells a path or a file of the server")
    if reply.body and reply.status >= 400:
        try:
            keys = set(json.loads(reply.body))
        except ValueError:
            keys = set()
        if keys != ({"detail"} if path == "/v1/systemone" else {"error"}) and b"Invalid HTTP" not in reply.body:
            found.append(f"an error of another form: {reply.body[:80]!r}")
    return found


def stop(served: Served, clips: Sequence[Path], clients: int = 16) -> dict[str, object]:
    """Ends the service by SIGTERM while clients send requests; counts those that were accepted and not answered."""
    contents, counts = [path.read_bytes() for path in clips], Counter[str]()
    lock, numbers = threading.Lock(), itertools.count()
    with ThreadPoolExecutor(clients) as threads:

        def client(_: int) -> None:
            while True:
                try:
                    reply = post(served.port, "/v1/classify?samples=4", contents[next(numbers) % len(contents)])
                    kind = str(reply.status) if reply.status != 503 or "retry-after" in reply.headers else "503 bare"
                except ConnectionRefusedError:
                    return
                except (HTTPException, OSError) as error:  # reset before it was accepted, or lost
                    kind = type(error).__name__
                with lock:
                    counts[kind] += 1

        running = [threads.submit(client, number) for number in range(clients)]
        while counts["200"] < clients:
            time.sleep(0.1)
        served.process.send_signal(signal.SIGTERM)
        sent = time.perf_counter()
        status = served.process.wait(300)
        seconds = time.perf_counter() - sent
        for one in running:
            one.result()
        left = list(served.temporary.iterdir())
        tracebacks = served.log.read_text(errors="replace").count("Traceback")
    answered = counts["200"] + counts["503"]
    return {
        "clients": clients,
        "answers": dict(counts),
        "lost": sum(counts.values()) - answered,
        "exit_status": status,
        "seconds_to_end": seconds,
        "tracebacks": tracebacks,
        "folders_left": len(left),
    }
