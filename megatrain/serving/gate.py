"""Who may ask what: before a request reaches its handler.

A page of a stranger in the user's browser can reach a server on this machine. It is kept out by three checks: `Host` must be an address or
a name of this machine (else a name that the stranger's DNS server leads here would do), bodies must be application/json (for which a
browser asks permission first, and gets none: there are no CORS headers), and where other machines can reach the server, a key is needed.
"""

from __future__ import annotations

import base64
import hmac
import ipaddress
from binascii import Error as Base64Error
from collections.abc import Callable, Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from megatrain.serving.refusal import Refusal

OPEN = "/health"
"""The path that needs no key, for whoever watches the server."""


@dataclass(frozen=True)
class Gate:
    """The checks of all requests, an ASGI application around another."""

    app: ASGIApp
    key: str | None
    """The key that a client must give; None: none."""
    hosts: Collection[str]
    """Names that `Host` may have beside addresses and localhost."""
    refused: Callable[[Refusal], Response]
    """The answer to who is not let through."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http":
            return
        try:
            self._require(scope, Headers(scope=scope))
        except Refusal as refusal:
            await self.refused(refusal)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _require(self, scope: Scope, headers: Headers) -> None:
        """Raise Refusal unless a request may pass."""
        self._require_host(headers.get("host", ""))
        if self.key is not None and scope["path"] != OPEN:
            require_key(headers.get("authorization", ""), self.key)
        if scope["method"] == "POST":
            self._require_json(headers)

    def _require_host(self, host: str) -> None:
        name = host_name(host)
        if name != "localhost" and name not in self.hosts and not is_address(name):
            known = ", ".join(["localhost", *sorted(self.hosts)])
            raise Refusal(
                f"the header Host is {host[:80]!r}, and the server answers to addresses and {known}. Start it with --allow-host NAME to be "
                "reached by another name.",
                status=403,
                code="host_not_allowed",
            )

    def _require_json(self, headers: Headers) -> None:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(f"the header Content-Type is {kind[:80]!r}. Use application/json.", status=415)


def host_name(host: str) -> str:
    """The name or address in a Host header, in small letters, without port, brackets or a last dot."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower().rstrip(".") if ":" in host else host.lower().rstrip(".")


def is_address(name: str) -> bool:
    """Whether a name is an IP address, which nobody's DNS server gives out as its own."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def require_key(authorization: str, key: str) -> None:
    """Raise Refusal unless a header has the key: `Bearer KEY`, or `Basic`, as browsers send it, with the key as password."""
    kind, _, given = authorization.partition(" ")
    if kind.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        except (Base64Error, UnicodeDecodeError):
            given = ""
    right = hmac.compare_digest(given.strip().encode(errors="replace"), key.encode())
    if kind.lower() not in ("bearer", "basic") or not right:
        said = "the API key is wrong" if given else "an API key is needed"
        raise Refusal(f"{said}. Send the header Authorization: Bearer KEY.", status=401, code="invalid_api_key")
