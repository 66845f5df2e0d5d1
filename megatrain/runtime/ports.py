"""Ports of this machine: whether a program can listen at one, which process does already, which one is free."""

from __future__ import annotations

import errno
import socket

import psutil

NEARBY = 100
"""How many ports above a used one are tried before the system chooses one."""


def is_free(port: int) -> bool:
    """Whether a program could listen at a port, on all addresses of this machine. Raises OSError if something else prevents it.

    The port is bound as the store binds it, but without listening: a rank that looks for the store meanwhile finds nothing.
    """
    dual = socket.has_dualstack_ipv6()
    with socket.socket(socket.AF_INET6 if dual else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections left by an ended job do not count
        if dual:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            probe.bind(("::" if dual else "0.0.0.0", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def free_port_near(port: int) -> int:
    """A port that is free now: the first above `port`, or any if none within NEARBY is."""
    for other in range(port + 1, min(port + 1 + NEARBY, 1 << 16)):
        if is_free(other):
            return other
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def holder(port: int) -> str:
    """The process that holds a port, as `process 4711 (python3 -m http.server)`, or text that this user may not see it."""
    try:
        held = [c for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.pid]
        held.sort(key=lambda connection: connection.status != psutil.CONN_LISTEN)  # a listener before its connections
        if held:
            process = psutil.Process(held[0].pid)
            return f"process {process.pid} ({' '.join(process.cmdline())[:100] or process.name()})"
    except psutil.Error:
        pass  # it has just ended, or the system hides it
    return "a process that this user may not see"


def trouble(port: int) -> str:
    """Why a program cannot listen at a port, with a port that would work; empty if it can."""
    try:
        if is_free(port):
            return ""
        why = f"is in use by {holder(port)}"
    except OSError as error:
        why = f"cannot be listened at ({error.strerror or error})"
        port = max(port, 1023)  # those below are for root
    return f"{why}. Choose another MASTER_PORT, for example {free_port_near(port)}."
