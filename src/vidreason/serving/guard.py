"""Checks who calls the service: the address that a request names, the page that it comes from, and its token.

A page of another site can send requests to a loopback address, and can have its own name resolve to it (DNS
rebinding). The first has the header ``Origin`` of that site, the second has its name in ``Host``.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from fastapi import Request

from vidreason.serving.bodies import discard
from vidreason.serving.errors import ApiError, response_of

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health")
"""Paths that need no token: they tell nothing about the model. Host and origin are checked there, too."""
_SHORTEST_TOKEN = 16
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::\d{1,5})?")
_LOCAL = ("localhost", "localhost.")


def is_loopback(host: str) -> bool:
    """Returns whether a name or address is this machine's own.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return host.lower() in _LOCAL or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(file: Path) -> str:
    """Returns the token in a file.

    Raises:
        ValueError: If it is too short, or not of visible ASCII characters.
    """
    token = file.read_text(encoding="utf-8").strip()
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(
            f"{file}: needs a token of at least {_SHORTEST_TOKEN} visible ASCII characters; make one with "
            f"`openssl rand -hex 32 > {file}`"
        )
    return token


class Guard:
    """Lets a request through to the application, or answers that it may not pass.

    Args:
        app: The application.
        loopback: Whether the service listens on a loopback address; a request has to name one then.
        token: What ``Authorization: Bearer`` has to hold; None asks for none.
        max_body: Most bytes of a refused body that are read.
    """

    def __init__(self, app: App, loopback: bool, token: str | None, max_body: int) -> None:
        self.app, self.loopback, self.token, self.max_body = app, loopback, token, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        error = self._refusal(request)
        if error is None:
            await self.app(scope, receive, send)
            return
        await discard(request, self.max_body)
        await response_of(error, scope["path"])(scope, receive, send)

    def _refusal(self, request: Request) -> ApiError | None:
        host = request.headers.get("host", "")
        if len(request.headers.getlist("host")) != 1 or (self.loopback and not is_loopback(_name_of(host))):
            message = f"this service answers on a loopback address only, and was called as {host[:100]!r}"
            return ApiError(403, message, code="wrong_host")
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "none")
        same = origin is None or origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())
        if not same or site not in ("none", "same-origin"):
            return ApiError(403, "pages of other sites may not call this service", code="wrong_origin")
        if self.token is None or request.scope["path"] in OPEN_PATHS:
            return None
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # compare_digest takes the same time however much of the token is right
        right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self.token.encode())
        if scheme.lower() == "bearer" and right:
            return None
        return ApiError(401, "the token is missing or wrong (Authorization: Bearer ...)", code="invalid_token")


def _name_of(host: str) -> str:
    """Returns the name or address in a Host header; empty if it is malformed.

    >>> _name_of("localhost:8000"), _name_of("[::1]:8000"), _name_of("[::1].example.org")
    ('localhost', '::1', '')
    """
    found = _HOST.fullmatch(host)
    return "" if found is None else (found[1] or found[2])
