"""Limits of a server: bounds of bodies, queues and times, and who may ask."""

from __future__ import annotations

import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class ServingLimits:
    """Bounds of one server."""

    key: str | None = None
    """The key that a client must give."""
    hosts: frozenset[str] = frozenset()
    """Names by which the server is reached, beside addresses and localhost."""
    body_bytes: int = 8 << 20
    body_seconds: float = 20.0
    """How long a body may take to arrive, and a request's headers."""
    most_running: int = 256
    """Texts that the engine works on at a time."""
    queue: int = 256
    """Texts that may wait beside them."""
    request_seconds: float = 600.0
    """How long a request may take."""
    connections: int = 1024
    """Connections at a time."""


def names_of_machine() -> frozenset[str]:
    """The names by which other machines may know this one."""
    name = socket.gethostname().lower()
    return frozenset({name, name.partition(".")[0], socket.getfqdn().lower()})
