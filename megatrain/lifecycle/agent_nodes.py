"""Where the nodes of a job meet: torchrun's rendezvous, told what it would guess, and asked with a limit.

Beside `agent.py`, and imported by it alone.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig

from megatrain.lifecycle.agent_logs import RankLogs
from megatrain.runtime import ports
from megatrain.runtime.interface import VARIABLE, Interface, check_names, choose, interfaces
from megatrain.runtime.launch import LaunchError
from megatrain.runtime.slurm import address_of
from megatrain.transport.group import TransportError
from megatrain.transport.store import await_listener, within

T = TypeVar("T")
PROBE_SECONDS = 5.0
ANSWER_SECONDS = 15
"""How long the store may take to answer: where its host has gone, each of the last words to it waits so long."""


def meet_at(config: LaunchConfig) -> None:
    """Say to torchrun's rendezvous what it would otherwise guess from host names. Raises LaunchError."""
    host, _, port = config.rdzv_endpoint.rpartition(":")
    host, present = address_of(host), interfaces()
    check_names(os.environ, [one.name for one in present])
    if config.max_nodes > 1 or os.environ.get(VARIABLE):
        config.local_addr = choose(os.environ.get(VARIABLE), host, present).address
    config.rdzv_endpoint = f"{host}:{port}"
    serves = serves_store(host, int(port), present)
    if not serves:
        wait_for(host, int(port))
    config.rdzv_configs |= {"is_host": serves, "join_timeout": join_seconds(), "read_timeout": ANSWER_SECONDS}
    # A store of its own for each start of the workers: one that is shared keeps the address of a node that has gone.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"


def watch_membership(config: LaunchConfig, logs: RankLogs) -> None:
    """Have `logs` know when torchrun restarts the workers because nodes have come, and no call wait for a store whose host has gone.

    torch's own limits do not hold there: a host that is cut off or has no power is waited for until TCP gives up, a quarter of an hour.
    """

    def create(parameters: RendezvousParameters) -> RendezvousHandler:
        parameters.backend = "c10d"
        handler = rendezvous_handler_registry.create_handler(parameters)
        count, enter, leave = handler.num_nodes_waiting, handler.next_rendezvous, handler.shutdown

        def num_nodes_waiting() -> int:
            waiting = answered(count)
            logs.grows = logs.grows or waiting > 0
            return waiting

        def next_rendezvous() -> RendezvousInfo:
            answered(handler.is_closed)  # is the store there?
            return enter()

        def shutdown() -> bool:
            try:
                return answered(leave)
            except RendezvousError:
                return False

        for name, asked in (
            ("num_nodes_waiting", num_nodes_waiting),
            ("next_rendezvous", next_rendezvous),
            ("shutdown", shutdown),
        ):
            setattr(handler, name, asked)
        return handler

    rendezvous_handler_registry.register("megatrain", create)
    config.rdzv_backend = "megatrain"


def answered(call: Callable[[], T]) -> T:
    """What a call to the store gives. Raises RendezvousConnectionError if it does not end in time; it is left behind in its thread."""
    try:
        return within(ANSWER_SECONDS, call, "the store where the nodes meet")
    except TransportError as error:
        raise RendezvousConnectionError(f"{error}: has its host gone?") from error


def join_seconds() -> int:
    """How long nodes wait for each other."""
    return int(os.environ.get("JOIN_TIMEOUT") or 600)


def serves_store(host: str, port: int, present: Sequence[Interface]) -> bool:
    """Whether this agent is to serve the store: it is at MASTER_ADDR, and no other agent of the job was there before."""
    node = os.environ.get("SLURM_NODEID") if "SLURM_STEP_ID" in os.environ else None
    mine = is_here(host, present) if node is None else node == "0"
    problem = ports.trouble(port) if mine else ""
    if problem and (node is not None or not is_store(host, port)):
        raise LaunchError(f"port {port} of {host}, where the nodes would meet, {problem}")
    return mine and not problem


def is_here(host: str, present: Sequence[Interface]) -> bool:
    """Whether a host is this machine."""
    try:
        addresses = {str(one[4][0]) for one in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise LaunchError(f"MASTER_ADDR={host} cannot be resolved on {socket.gethostname()}: {error}") from error
    own = {one.address for one in present}
    return any(address in own or ipaddress.ip_address(address).is_loopback for address in addresses)


def is_store(host: str, port: int) -> bool:
    """Whether another agent of this job, on the same machine, serves the store already."""
    try:
        within(PROBE_SECONDS, lambda: TCPStore(host, port, is_master=False, wait_for_workers=False), "the store")
    except TransportError:
        return False
    return True


def wait_for(host: str, port: int) -> None:
    """Return when something listens there. Raises LaunchError."""
    try:
        await_listener(host, port, join_seconds())
    except OSError as error:
        raise LaunchError(
            f"{socket.gethostname()} could not reach {host}:{port}, where the nodes meet, within {join_seconds()} s ({error}). "
            "Was the job started there, does MASTER_ADDR name it, is the port open? JOIN_TIMEOUT sets how long to wait."
        ) from error
