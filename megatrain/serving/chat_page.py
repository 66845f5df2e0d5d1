"""The chat page: one file, without anything from elsewhere, which its headers forbid."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib.resources import files

from starlette.responses import Response


@functools.cache
def page() -> tuple[bytes, dict[str, str]]:
    """(the page, its headers): of scripts and styles only those within it may run, and it talks to this server alone."""
    html = (files("megatrain.serving") / "page.html").read_text("utf-8")
    allowed = {}
    for tag in ("script", "style"):
        hashes = [_hash(text) for text in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)]
        allowed[tag] = " ".join(hashes)
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return html.encode(), headers


def page_response() -> Response:
    """The page as a response."""
    html, headers = page()
    return Response(html, media_type="text/html", headers=headers)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
