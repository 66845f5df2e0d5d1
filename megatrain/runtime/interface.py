"""Chooses the network interface that the ranks of several machines talk through.

It is the one that the user names in MEGATRAIN_INTERFACE: by name (eth0), address (10.0.0.5) or network (10.0.0.0/16), which is the same
text on machines that number their cards differently; several, joined by commas, are tried in order. Otherwise it is the one that leads to
MASTER_ADDR. Host names are not used: on many systems a machine's own name is a loopback address, which no other machine can reach.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

import psutil

from megatrain.runtime.launch import LOCAL_NAMES, Launch, LaunchError

VARIABLE = "MEGATRAIN_INTERFACE"
BACKENDS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
ANYWHERE = "192.0.2.1"
"""An address reserved for documentation (RFC 5737): the route to it is the default route."""


@dataclass(frozen=True)
class Interface:
    """One address of this machine, and the network interface that has it."""

    name: str
    address: str

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        return ipaddress.ip_address(self.address).is_loopback

    def __str__(self) -> str:
        return f"{self.name} ({self.address})"


def interfaces() -> list[Interface]:
    """All addresses of the interfaces that are up, IPv4 before IPv6, without link-local ones."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        for name, addresses in psutil.net_if_addrs().items():
            texts = [one.address.partition("%")[0] for one in addresses if one.family == family and name in up]
            found += [Interface(name, text) for text in texts if not ipaddress.ip_address(text).is_link_local]
    return found


def choose(asked: str | None, master: str | None, present: Sequence[Interface]) -> Interface:
    """The interface of this machine for a job whose ranks meet at `master`. Raises LaunchError."""
    if asked:
        for wish in asked.split(","):
            if (found := _named(wish.strip(), present)) is not None:
                return found
        raise LaunchError(
            f"{VARIABLE}={asked} is no interface, address or network of {socket.gethostname()}; it has {_list(present)}. "
            "Set it to a name, an address, or a network such as 10.0.0.0/16 that holds one of them."
        )
    for target in (master, ANYWHERE):
        address = None if target is None else _way_to(target)
        for one in present:
            if one.address == address and not one.is_loopback:
                return one
    others = [one for one in present if not one.is_loopback]
    if len({one.name for one in others}) == 1:
        return others[0]
    raise LaunchError(
        f"{socket.gethostname()} has {_list(present)}: which of them reaches the other machines cannot be told from "
        f"MASTER_ADDR={master}. Set {VARIABLE} to its name or address."
    )


def reached(host: str, env: Mapping[str, str]) -> str:
    """`host`, where ranks of several machines meet, as this machine has it. Raises LaunchError.

    On many systems a machine's own name means loopback, which no other machine reaches: then the address by which they do.
    """
    try:
        addresses = {str(one[4][0]).partition("%")[0] for one in socket.getaddrinfo(host, None)}
    except OSError:
        return host  # whoever connects says so
    if host in LOCAL_NAMES or not all(ipaddress.ip_address(one).is_loopback for one in addresses):
        return host
    return choose(env.get(VARIABLE) or env.get("GLOO_SOCKET_IFNAME"), None, interfaces()).address


def launched(env: Mapping[str, str]) -> Launch:
    """The launch that the environment tells, with the address of the store as this machine has it. Raises LaunchError."""
    launch = Launch.from_environment(env)
    if launch.master_addr is None or launch.launcher_serves or not launch.is_spread:
        return launch
    return replace(launch, master_addr=reached(launch.master_addr, env))


def use(launch: Launch, env: MutableMapping[str, str]) -> Interface | None:
    """Choose an interface, if ranks are on several machines or the user names one, and set the backends' variables; else None.

    Variables that the user has set for a backend stay. Raises LaunchError.
    """
    present = interfaces()
    check_names(env, [one.name for one in present])
    asked = env.get(VARIABLE)
    if not asked and not launch.is_spread:
        return None
    if not asked and env.get("GLOO_SOCKET_IFNAME"):
        return None
    chosen = choose(asked, launch.master_addr, present)
    env.setdefault("GLOO_SOCKET_IFNAME", chosen.name)
    if asked:  # else NCCL chooses by itself, also among InfiniBand devices
        env.setdefault("NCCL_SOCKET_IFNAME", f"={chosen.name}")
    return chosen


def address_of_run(launch: Launch, env: Mapping[str, str]) -> str:
    """The address at which other machines of a run reach this one: of the interface that the run uses. Raises LaunchError.

    Call it after `use`, which sets gloo's variable.
    """
    present = interfaces()
    asked = env.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    used = next((one for one in present if one.name == asked), None)
    return (used or choose(env.get(VARIABLE), launch.master_addr, present)).address


def check_names(env: Mapping[str, str], names: Sequence[str]) -> None:
    """Raise LaunchError if a variable of a backend names no interface of this machine."""
    for variable in BACKENDS:
        asked = env.get(variable, "")
        if asked and not serves(variable, asked, names):
            raise LaunchError(
                f"{variable}={asked} is no interface of {socket.gethostname()}; it has {', '.join(sorted(set(names)))}. "
                f"Set {variable} to one of them, or {VARIABLE} to an address or a network."
            )


def serves(variable: str, value: str, names: Sequence[str]) -> bool:
    """Whether a backend finds an interface for the `value` of its `variable`; names: interfaces with an address.

    gloo needs every name of a list, exactly; NCCL takes prefixes, = for exact names, ^ for all but these.
    """
    if variable.startswith("GLOO"):
        return all(part in names for part in value.split(","))
    if value.startswith("^"):
        return True
    exact = value.startswith("=")
    parts = value.removeprefix("=").split(",")
    return any(name == part if exact else name.startswith(part) for name in names for part in parts)


def _named(wish: str, present: Sequence[Interface]) -> Interface | None:
    by_name = next((one for one in present if one.name == wish), None)
    if by_name is not None:
        return by_name
    try:
        network = ipaddress.ip_network(wish, strict=False)
    except ValueError:
        return None
    return next((one for one in present if ipaddress.ip_address(one.address) in network), None)


def _way_to(host: str) -> str | None:
    """The address of this machine that packets to `host` would come from, None if there is no route; no packet is sent."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _list(present: Sequence[Interface]) -> str:
    return ", ".join(str(one) for one in present) or "none"
