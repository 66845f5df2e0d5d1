"""The rendezvous of a job's nodes: torchrun's, with addresses that it would guess given to it, and time limits on its store.

`agent.py` imports it.
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
from megatrain.lifecycle.agent_store import rendezvous
from megatrain.runtime import ports
from megatrain.runtime.interface import VARIABLE, Interface, check_names, choose, interfaces, reached
from megatrain.runtime.launch import LaunchError, require_host
from megatrain.runtime.secret import VARIABLE as SECRET
from megatrain.runtime.slurm import address_of
from megatrain.runtime.variables import number_in
from megatrain.transport.group import TransportError
from megatrain.transport.store import await_listener, within

T = TypeVar("T")
PROBE_SECONDS = 5.0
ANSWER_SECONDS = 15
"""Limit of one call to the store. When its host is gone, each of the last calls, while leaving, takes this long."""


def meet_at(config: LaunchConfig) -> None:
    """Give torchrun's rendezvous the addresses that it would otherwise guess from host names. Raises LaunchError."""
    host, _, port = config.rdzv_endpoint.rpartition(":")
    host, present = address_of(host), interfaces()
    require_host(host)
    check_names(os.environ, [one.name for one in present])
    if config.max_nodes > 1:
        host = reached(host, os.environ)
    if config.max_nodes > 1 or os.environ.get(VARIABLE):
        config.local_addr = choose(os.environ.get(VARIABLE), host, present).address
    config.rdzv_endpoint = f"{host}:{port}"
    serves = serves_store(host, int(port), present)
    if not serves:
        wait_for(host, int(port))
    config.rdzv_configs |= {"is_host": serves, "join_timeout": join_seconds(), "read_timeout": ANSWER_SECONDS}
    # Each start of the workers gets its own store: a shared one keeps the address of a node that is gone.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"


class LimitedRendezvous(RendezvousHandler):
    """Torch's rendezvous with a limit on each call to its store, whose host may be gone; tells `logs` when nodes wait to join.

    Torch's own limits do not work there: it waits for a host that is cut off or has no power until TCP gives up, a quarter of an hour.
    """

    def __init__(self, inner: RendezvousHandler, logs: RankLogs, run_id: str) -> None:
        """run_id: the job's, which its workers are told; that of the inner handler may hold a secret."""
        self.inner, self.logs, self.run_id = inner, logs, run_id

    @property
    def use_agent_store(self) -> bool:
        """Whether the wrapped rendezvous handler shares its store with the workers."""
        return self.inner.use_agent_store

    def get_backend(self) -> str:
        """The backend of the wrapped rendezvous handler."""
        return self.inner.get_backend()

    def get_run_id(self) -> str:
        """The job's run id."""
        return self.run_id

    def is_closed(self) -> bool:
        """Whether the wrapped rendezvous handler is closed."""
        return self.inner.is_closed()

    def set_closed(self) -> None:
        """Close the wrapped rendezvous handler."""
        self.inner.set_closed()

    def num_nodes_waiting(self) -> int:
        """Number of nodes that wait to join; torchrun restarts the workers when there are any."""
        waiting = answered(self.inner.num_nodes_waiting)
        self.logs.grows = self.logs.grows or waiting > 0
        return waiting

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other nodes. Raises RendezvousError, at once where the store does not answer."""
        answered(self.inner.is_closed)
        return self.inner.next_rendezvous()

    def shutdown(self) -> bool:
        """Leave; False where the store does not answer."""
        try:
            return answered(self.inner.shutdown)
        except RendezvousError:
            return False


def watch_membership(config: LaunchConfig, logs: RankLogs, one_machine: bool) -> None:
    """Make torchrun meet the other nodes through a LimitedRendezvous over a store of its own (`agent_store.py`)."""
    secret, run_id = os.environ.get(SECRET, ""), config.run_id

    def create(parameters: RendezvousParameters) -> RendezvousHandler:
        parameters.backend = "c10d"
        return LimitedRendezvous(rendezvous(parameters, secret, one_machine), logs, run_id)

    rendezvous_handler_registry.register("megatrain", create)
    config.rdzv_backend = "megatrain"


def answered(call: Callable[[], T]) -> T:
    """The result of a call to the store. Raises RendezvousConnectionError if it takes too long; it is then abandoned in its thread."""
    try:
        return within(ANSWER_SECONDS, call, "the store where the nodes meet")
    except TransportError as error:
        raise RendezvousConnectionError(f"{error}: has its host gone?") from error


def join_seconds() -> int:
    """How long nodes wait for each other, in seconds: $JOIN_TIMEOUT or 600. Raises ValueError if that is no number."""
    return number_in(os.environ, "JOIN_TIMEOUT") if os.environ.get("JOIN_TIMEOUT") else 600


def serves_store(host: str, port: int, present: Sequence[Interface]) -> bool:
    """Whether this agent must serve the store: it runs at MASTER_ADDR, and no agent of the job there does yet. Raises LaunchError."""
    node = os.environ.get("SLURM_NODEID") if "SLURM_STEP_ID" in os.environ else None
    mine = is_here(host, present) if node is None else node == "0"
    problem = ports.trouble(port) if mine else ""
    if problem and (node is not None or not is_store(host, port)):
        raise LaunchError(f"port {port} of {host}, where the nodes would meet, {problem}")
    return mine and not problem


def is_here(host: str, present: Sequence[Interface]) -> bool:
    """Whether `host` is this machine. Raises LaunchError if its name cannot be resolved."""
    try:
        addresses = {str(one[4][0]) for one in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise LaunchError(f"MASTER_ADDR={host} cannot be resolved on {socket.gethostname()}: {error}") from error
    own = {one.address for one in present}
    return any(address in own or ipaddress.ip_address(address).is_loopback for address in addresses)


def is_store(host: str, port: int) -> bool:
    """Whether a store answers at the port, served by another agent of this job on the same machine."""
    try:
        within(PROBE_SECONDS, lambda: TCPStore(host, port, is_master=False, wait_for_workers=False), "the store")
    except TransportError:
        return False
    return True


def wait_for(host: str, port: int) -> None:
    """Return when something listens at host:port. Raises LaunchError after `join_seconds`."""
    try:
        await_listener(host, port, join_seconds())
    except OSError as error:
        raise LaunchError(
            f"{socket.gethostname()} could not reach {host}:{port}, where the nodes meet, within {join_seconds()} s ({error}). "
            "Was the job started there, does MASTER_ADDR name it, is the port open? JOIN_TIMEOUT sets how long to wait."
        ) from error
