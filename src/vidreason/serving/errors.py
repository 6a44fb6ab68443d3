"""Errors that a client gets, in the form of the endpoint that it called."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from fastapi.responses import Response
from pydantic import ValidationError

SYSTEMONE = "/v1/systemone"
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_MOST_LISTED = 20  # invalid fields that an error lists


@dataclass
class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: One sentence for the client.
        where: Path of the field in the body, such as ``("questions", 0, "choices")``.
        code: The kind of mistake, for programs.
        retry_after: Seconds after which a client may try again.
        details: Further mistakes in the form of ``/v1/systemone``.
    """

    status: int
    message: str
    where: tuple[str | int, ...] = ()
    code: str = ""
    retry_after: int | None = None
    details: tuple[Mapping[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.message


def invalid(error: ValidationError, status: int) -> ApiError:
    """Returns the error for a body that does not fit its form."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[:_MOST_LISTED]
    details = tuple({"loc": ["body", *item["loc"]], "msg": item["msg"], "type": item["type"]} for item in found)
    where, message = tuple(found[0]["loc"]), found[0]["msg"]
    return ApiError(
        status, f"{path_of(where)}: {message}" if where else message, where, found[0]["type"], None, details
    )


def path_of(where: Sequence[str | int]) -> str:
    """Returns the path of a field as text.

    >>> path_of(("questions", 0, "choices"))
    'questions[0].choices'
    """
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")


def response_of(error: ApiError, path: str) -> Response:
    """Returns the response to a request that failed.

    Args:
        error: The error.
        path: Path of the endpoint.
    """
    code = error.code or ("invalid_value" if error.status in (400, 422) else "")
    body: dict[str, Any]
    if path.rstrip("/") == SYSTEMONE:
        one = {"loc": ["body", *error.where] if error.where else [], "msg": error.message, "type": code or "error"}
        body = {"detail": [dict(item) for item in error.details] or [one]}
    else:
        kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
        param = path_of(error.where) or None
        body = {"error": {"message": error.message, "type": kind, "param": param, "code": code or None}}
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(body, error.status, headers)


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Returns JSON that no browser takes for a page, and that no cache keeps, with an id that both clients show."""
    number = uuid4().hex
    fixed = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
    fixed |= {"X-Request-Id": number, "X-TypeSafe-Request-Id": number}
    text = json.dumps(body, ensure_ascii=True, allow_nan=False)
    return Response(text, status, {**fixed, **(headers or {})}, "application/json")
