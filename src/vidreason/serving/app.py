"""The web application: paths, and errors in the form of each endpoint."""

from __future__ import annotations

import asyncio
import html
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import vidreason
from vidreason.serving.bodies import discard
from vidreason.serving.classify_api import answer_classify, parse_classify
from vidreason.serving.decisions_api import DecisionRequest, answer_decisions, parse_decisions
from vidreason.serving.draining import LastAnswers
from vidreason.serving.errors import ApiError, json_response, response_of
from vidreason.serving.guard import Guard
from vidreason.serving.page import make_page
from vidreason.serving.requests import About
from vidreason.serving.service import Answered, Parse, Service
from vidreason.serving.systemone_api import SystemOneRequest, answer_systemone, parse_systemone

_CLIP = {"schema": {"type": "string", "format": "binary"}}
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>vidreason API</title>
<style>body{{font:16px/1.5 system-ui;max-width:60em;margin:2em auto;padding:0 1em}}pre{{overflow:auto}}</style>
<h1>vidreason {version}</h1><p>Machine-readable: <a href="openapi.json">openapi.json</a></p>{body}"""


def make_app(service: Service, loopback: bool = True, token: str | None = None) -> FastAPI:
    """Returns the application of a service.

    Args:
        service: Answers the requests.
        loopback: Whether it listens on a loopback address; requests have to name one then.
        token: What ``Authorization: Bearer`` has to hold; None asks for none.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.close()

    # FastAPI's own page loads scripts of another site, which could call this service.
    app = FastAPI(
        title="vidreason",
        version=vidreason.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Guard, loopback=loopback, token=token, max_body=service.options.max_body)
    app.add_middleware(LastAnswers, service=service)  # outermost
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_crash)
    _add_information(app, service, token is not None)
    _add_questions(app, service)
    return app


def _add_information(app: FastAPI, service: Service, token: bool) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """Shows the page that asks about a clip."""
        return make_page(service.options, token)

    @app.get("/health")
    async def health() -> Response:
        """Tells whether the service takes requests (200) or is stopping (503)."""
        state = {"status": "stopping" if service.stopping else "ok", "active": service.active}
        return json_response(state, 503 if service.stopping else 200)

    @app.get("/v1/models")
    async def models() -> Response:
        """Lists the only model, for clients of both interfaces."""
        return json_response(_models(service.about))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """Shows this description as a page without scripts."""
        headers = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return HTMLResponse(_page(app.openapi()), headers=headers)


def _add_questions(app: FastAPI, service: Service) -> None:
    about, options = service.about, service.options

    @app.post("/v1/decisions", openapi_extra=_json_body(DecisionRequest))
    async def decisions(request: Request) -> Response:
        """Answers 1 to 400 closed questions about a clip, in the form of the client ``openai``."""
        return await _ask(service, request, partial(parse_decisions, about, options), answer_decisions)

    @app.post("/v1/systemone", openapi_extra=_json_body(SystemOneRequest))
    async def systemone(request: Request) -> Response:
        """Answers 1 to 64 closed questions about a clip, in the form of the client ``typesafe-sdk``."""
        return await _ask(service, request, partial(parse_systemone, about, options), answer_systemone)

    classify_body = {"content": {"video/*": _CLIP, "multipart/form-data": {"schema": {"type": "object"}}}}

    @app.post("/v1/classify", openapi_extra={"requestBody": classify_body})
    async def classify(request: Request) -> Response:
        """Says everything that the run knows about one clip; query: ``samples=K``, ``frames=true``."""
        parse = partial(parse_classify, about, options, request.query_params)
        return await _ask(service, request, parse, answer_classify)


async def _ask(
    service: Service, request: Request, parse: Parse, render: Callable[[About, Answered], dict[str, Any]]
) -> Response:
    try:
        with service.admitted():
            answered = await service.ask(request, parse)
            body = await asyncio.to_thread(render, service.about, answered)
            return json_response(body)
    except ApiError as error:
        await discard(request, service.options.max_body)
        return response_of(error, request.scope["path"])
    except ClientDisconnect:
        return Response(status_code=400)  # nobody reads it


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status, known = error.status_code, {404: "there is no such path", 405: f"{request.method} is not possible here"}
    message = known.get(status, str(error.detail))
    return response_of(ApiError(status, message, code="not_found" if status == 404 else ""), request.scope["path"])


async def _on_crash(request: Request, error: Exception) -> Response:
    """Answers a request that failed by a fault of the service, whose log has the traceback."""
    message = "the service failed; its log says why"
    return response_of(ApiError(500, message, code="internal_error"), request.scope["path"])


def _models(about: About) -> dict[str, Any]:
    released = datetime.fromtimestamp(about.released, UTC).date().isoformat()
    one = {"id": about.name, "object": "model", "created": int(about.released), "owned_by": "vidreason"}
    classes = list(about.task.label_names)
    task = {"question": about.task.question, "classes": classes, "samples": about.samples}
    threshold = None if about.threshold is None else about.threshold.confidence
    extra = {"calibration": about.calibration(True), "threshold": threshold}
    other = {"name": about.name, "description": about.description, "release_date": released}
    return {"object": "list", "data": [{**one, "task": task, **extra}], "models": [other]}


def _json_body(kind: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(kind)}}}}


def _inlined(kind: type[BaseModel]) -> dict[str, Any]:
    """Returns the schema of a body, with its parts in place."""
    schema = kind.model_json_schema()
    parts = schema.pop("$defs", {})

    def replaced(value: Any) -> Any:
        if isinstance(value, list):
            return [replaced(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return replaced(parts[str(value["$ref"]).rpartition("/")[2]])
        return {key: replaced(item) for key, item in value.items() if key != "discriminator"}

    found: dict[str, Any] = replaced(schema)
    return found


def _page(schema: dict[str, Any]) -> str:
    """Returns the description of the service as HTML."""
    sections = []
    for path, methods in schema["paths"].items():
        for method, what in methods.items():
            body = what.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            shown = "" if body is None else f"<pre>{html.escape(json.dumps(body, indent=1))}</pre>"
            text = html.escape(what.get("description", ""))
            sections.append(f"<h2>{method.upper()} {html.escape(path)}</h2><p>{text}</p>{shown}")
    return _PAGE.format(version=html.escape(schema["info"]["version"]), body="".join(sections))
