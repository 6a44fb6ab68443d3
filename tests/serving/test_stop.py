"""The end of the service under load: every request on a connection that the server has accepted is answered."""

import itertools
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection

import pytest
import served_model as world
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vidreason.answering.loaded import LoadedModel
from vidreason.serving.app import make_app
from vidreason.serving.draining import DrainingServer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="clients are told apart by addresses in 127.0.0.0/8")
CLIENTS = 16


@dataclass
class Seen:
    """The observations of server and clients; a connection is named by the address of its client."""

    accepted: set[str] = field(default_factory=set)
    outcomes: dict[str, str] = field(default_factory=dict)
    closing: dict[str, str] = field(default_factory=dict)


def recording(seen: Seen) -> type[H11Protocol]:
    """The protocol, which notes connections that were accepted."""

    class Recording(H11Protocol):
        def connection_made(self, transport):
            super().connection_made(transport)
            seen.accepted.add(self.client[0])

    return Recording


def keep_asking(port: int, clip: bytes, seen: Seen, numbers: "itertools.count[int]") -> None:
    """Sends requests without a pause, each on a connection with an address of its own, until none is accepted."""
    while True:
        number = next(numbers)
        address = f"127.1.{number // 256}.{number % 256}"
        connection = HTTPConnection("127.0.0.1", port, timeout=60, source_address=(address, 0))
        try:
            connection.request("POST", "/v1/classify", clip)
            response = connection.getresponse()
            response.read()
            seen.outcomes[address] = str(response.status)
            seen.closing[address] = response.getheader("connection", "")
        except ConnectionRefusedError:
            return
        except OSError as error:
            seen.outcomes[address] = type(error).__name__
        finally:
            connection.close()


@pytest.mark.slow
def test_every_accepted_connection_is_answered_at_the_end(loaded: LoadedModel, clips: list[bytes]):
    service, seen, numbers = world.make_service(loaded), Seen(), itertools.count(1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        port = listener.getsockname()[1]
        config = uvicorn.Config(make_app(service), http=recording(seen), ws="none", log_level="warning", lifespan="on")
        server = threading.Thread(target=DrainingServer(config, service).run, args=([listener],))
        server.start()
        clients = [threading.Thread(target=keep_asking, args=(port, clips[0], seen, numbers)) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        until = time.monotonic() + 60
        while list(seen.outcomes.values()).count("200") < CLIENTS and time.monotonic() < until:
            time.sleep(0.01)
        service.stopping = True
        for thread in (*clients, server):
            thread.join(60)
            assert not thread.is_alive()
    answered = {address for address, outcome in seen.outcomes.items() if outcome in ("200", "503")}
    assert len(seen.outcomes) > 2 * CLIENTS, "the clients went on after the end was asked for"
    assert seen.accepted <= answered
    assert all(seen.closing[address] == "close" for address in answered if seen.outcomes[address] == "503")


def test_a_connection_may_send_its_first_request_after_the_end_was_asked_for(loaded: LoadedModel):
    service = world.make_service(loaded)
    with world.running(service) as port, socket.create_connection(("127.0.0.1", port), 10) as early:
        assert world.call(port, "/health").status == 200  # accepted after the early one
        service.stopping = True
        while _listens(port):
            time.sleep(0.02)
        early.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = early.recv(1000)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"connection: close" in answer


def _listens(port: int) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 10):
        return True
    return False
