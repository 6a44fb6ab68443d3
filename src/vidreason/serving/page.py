"""The page at ``/``: one file without other addresses, whose Content-Security-Policy names its script by hash."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from fastapi.responses import HTMLResponse
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from vidreason.serving.limits import ServingOptions


def make_page(options: ServingOptions, token: bool) -> HTMLResponse:
    """Returns the page, which tells nothing about the model: it asks the service for that.

    Args:
        options: Limits that it tells before an upload.
        token: Whether it has to ask for a token.
    """
    web = files("vidreason.serving").joinpath("web")
    css, script, template = (web.joinpath(f"page.{end}").read_text(encoding="utf-8") for end in ("css", "js", "html"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(template).render(
        css=Markup(css), script=Markup(script), options=options, token=token
    )
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(css)}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    fixed = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
    return HTMLResponse(text, headers={"Content-Security-Policy": policy, **fixed})


def _hash(text: str) -> str:
    """Returns what a Content-Security-Policy calls the content of an element."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
