"""The end of the service: every request on a connection that it has accepted is answered before it closes."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vidreason.serving.guard import App, Receive, Scope, Send
from vidreason.serving.service import Service

_LOOK_S = 0.05  # between looks whether all requests are answered
_FIRST_REQUEST_S = 1.0  # for which a connection that was accepted last may take to send its request


class LastAnswers:
    """Tells clients of a service that stops to send no more requests on their connections.

    Args:
        app: The application.
        service: The service.
    """

    def __init__(self, app: App, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, with ``Connection: close`` if the service is stopping by then."""

        async def send_last(message: Scope) -> None:
            if message["type"] == "http.response.start" and self.service.stopping:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        await self.app(scope, receive, send_last)


class DrainingServer(uvicorn.Server):
    """A server that answers what it has accepted after a signal, and other requests with 503 until then.

    Args:
        config: Configuration of the server, with the protocol h11.
        service: The service.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to stop; a second signal ends the server at once."""
        if self.service.stopping:
            self.should_exit = self.force_exit = True
        self.service.stopping = True

    async def main_loop(self) -> None:
        """Serves until a signal has come and every accepted request is answered."""
        ending = asyncio.create_task(self._end_when_drained())
        await super().main_loop()
        await ending

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops to listen, answers what was sent on open connections, and closes them.

        uvicorn alone closes connections whose first request it has not read yet, and the kernel resets those that
        nobody has accepted when the socket that listens is closed.
        """
        accepted = [connection for listener in sockets or [] for connection in _accept_waiting(listener)]
        for server in self.servers:
            server.close()
        loop = asyncio.get_running_loop()
        for connection in accepted:
            await loop.connect_accepted_socket(self._make_protocol, connection)
        until = loop.time() + _FIRST_REQUEST_S
        await asyncio.sleep(_LOOK_S)  # requests that have arrived on older connections are read
        while self._has_silent_connection() and loop.time() < until and not self.force_exit:
            await asyncio.sleep(_LOOK_S)
        await super().shutdown(sockets)

    async def _end_when_drained(self) -> None:
        while not self.should_exit and not (self.service.stopping and not self.service.active):
            await asyncio.sleep(_LOOK_S)
        self.should_exit = True

    def _make_protocol(self) -> H11Protocol:
        made: H11Protocol = self.config.http_protocol_class(self.config, self.server_state, self.lifespan.state)  # type: ignore[call-arg,assignment]
        return made

    def _has_silent_connection(self) -> bool:
        """Returns whether the first request of a connection has not been read yet."""
        return any(getattr(connection, "cycle", None) is None for connection in self.server_state.connections)


def _accept_waiting(listener: socket.socket) -> list[socket.socket]:
    """Returns the connections that wait to be accepted by a socket, which does not block."""
    found: list[socket.socket] = []
    with suppress(BlockingIOError):
        while True:
            found.append(listener.accept()[0])
    return found
