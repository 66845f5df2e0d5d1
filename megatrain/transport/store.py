"""The key-value store where the processes of a job meet, before there is any group."""

from __future__ import annotations

import errno
import resource
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed import FileStore, Store, TCPStore  # type: ignore[attr-defined]

from megatrain.transport.group import TransportError

T = TypeVar("T")

ANSWER_SECONDS = 10.0
"""How long the store where ranks meet may take to answer once its port is open, in a small world."""
ATTEMPT_SECONDS = 5.0
"""Time limit of one attempt to reach a host that may not be up yet."""
ANSWERS_PER_SECOND = 500.0
"""Ranks that the store accepts a second, at least: torch's store looks up the name of each that connects, one after the other."""
CONNECTIONS_PER_RANK = 4
"""Most connections that a rank has to the store at one time."""
SPARE_FILES = 1024
_BACKLOG = 4096
"""Connections that may wait to be accepted; the system's own limit may be lower."""
MOST_KEYS = 512
"""Most keys in one message: the store's time grows with the square of a message's length."""


def open_store(rank: int, size: int, rendezvous: tuple[str, int] | Path, limit: timedelta, serve: bool) -> Store:
    """The key-value store where ranks meet: a file, or host:port that this process serves (`serve`). Raises TransportError."""
    if isinstance(rendezvous, Path):
        return FileStore(str(rendezvous), size)
    host, port = rendezvous
    if not serve:
        return _reach_store(rank, size, host, port, limit)
    allow_files(CONNECTIONS_PER_RANK * size + SPARE_FILES)
    try:
        return serve_at(host, port, limit)
    except (RuntimeError, ValueError, OSError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise TransportError(
                f"rank {rank} cannot serve port {port} on {host}: it is in use, perhaps by another job. {other_port(port)}"
            ) from error
        raise TransportError(f"rank {rank} cannot serve a store at {host}:{port}: {headline(error)}") from error


def serve_at(host: str, port: int, limit: timedelta) -> TCPStore:
    """A store that this process serves at host:port; port 0: a free one, which `store.port` tells. Raises OSError and RuntimeError."""
    listener = _listen(host, port)
    at: int = listener.getsockname()[1]
    return TCPStore(host, at, is_master=True, timeout=limit, wait_for_workers=False, master_listen_fd=listener.detach())


def _listen(host: str, port: int) -> socket.socket:
    """A socket at the address that `host` names, on no other interface: whoever reaches the store may write to it. Raises OSError.

    On all interfaces only where that address is not one of this machine: the others reach it by a translated address.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    try:
        return socket.create_server((str(address[0]), port), family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=_BACKLOG, dualstack_ipv6=dual)


def answer_seconds(ranks: int) -> float:
    """How long to wait for the store's answer when `ranks` ranks connect at the same time."""
    return ANSWER_SECONDS + ranks / ANSWERS_PER_SECOND


def allow_files(number: int) -> None:
    """Raise the soft limit of open files (usually 1024) to `number`, or to the hard limit if that is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # where the system refuses, ranks that the store cannot accept report it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _reach_store(rank: int, size: int, host: str, port: int, limit: timedelta) -> Store:
    """The store that another process serves at host:port, which may start later. Raises TransportError.

    First waits until the port accepts connections. Only then can the wait for the store's answer be short; torch's own time limit does
    not end it: a port that another program holds, and never answers on, would be waited for without end.
    """
    try:
        await_listener(host, port, limit.total_seconds())
    except OSError as error:
        raise TransportError(
            f"rank {rank} cannot reach the store at {host}:{port} within {limit.total_seconds():g} s. "
            f"Is MASTER_ADDR the host of rank 0, has rank 0 started, is the port open? ({error})"
        ) from error
    try:
        return within(
            answer_seconds(size),
            lambda: TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False),
            "the store",
        )
    except TransportError as error:
        raise TransportError(
            f"rank {rank} found something at {host}:{port} that is not the store of this job: another program that uses "
            f"the port, or a rank 0 that ended at its start. {other_port(port)} ({headline(error)})"
        ) from error


def await_listener(host: str, port: int, seconds: float) -> None:
    """Return when something listens at host:port. Raises the last attempt's OSError if nothing does within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, min(ATTEMPT_SECONDS, deadline - time.monotonic()))).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def other_port(port: int) -> str:
    """Advice for a port that is taken."""
    return f"Choose another MASTER_PORT, for example {port + 1 if port < 65535 else 29500}."


def headline(error: Exception) -> str:
    """The first line of an error; torch may add a C++ stack."""
    return str(error).partition("\n")[0]


def within(seconds: float, call: Callable[[], T], what: str) -> T:
    """The result of `call`, made in a thread that is abandoned after `seconds`. Raises TransportError then, and where torch's store fails.

    what: name of the thing called, for the message.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((True, call()))
        except Exception as error:
            outcome.extend((False, error))

    thread = threading.Thread(target=run, name="megatrain-store", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TransportError(f"{what} did not answer within {seconds:g} s")
    succeeded, result = outcome
    if succeeded:
        return result
    if isinstance(result, (RuntimeError, ValueError)):
        raise TransportError(f"{what} is lost: {result}") from result
    raise result
