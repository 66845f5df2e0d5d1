"""Which network interface: named, by address, by network, by the way to MASTER_ADDR; and what is no answer."""

import socket
from dataclasses import replace

import pytest

from megatrain.runtime import interface
from megatrain.runtime.interface import Interface, check_names, choose, interfaces, use
from megatrain.runtime.launch import Launch, LaunchError

LOOPBACK, ETHERNET, FABRIC = Interface("lo", "127.0.0.1"), Interface("eth0", "10.0.0.5"), Interface("ib0", "172.16.3.5")
PRESENT = [LOOPBACK, ETHERNET, FABRIC, Interface("ib0", "fd00::5")]
NODES = Launch(world_size=4, local_world_size=2, master_addr="node1", launcher="torchrun")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("ib0", FABRIC),
        ("10.0.0.5", ETHERNET),
        ("172.16.0.0/16", FABRIC),
        ("172.16.9.9/16", FABRIC),
        ("ib7,192.168.0.0/16, eth0", ETHERNET),
        ("fd00::/8", PRESENT[3]),
        ("lo", LOOPBACK),
    ],
)
def test_what_the_user_names(asked, expected):
    assert choose(asked, "anything", PRESENT) == expected


@pytest.mark.parametrize("asked", ["ib7", "10.0.0.6", "192.168.0.0/16", "not/a/network"])
def test_what_is_not_there_is_told_with_what_is(asked):
    with pytest.raises(LaunchError, match=r"has lo \(127.0.0.1\), eth0 \(10.0.0.5\)"):
        choose(asked, "node1", PRESENT)


def ways(monkeypatch, **table):
    monkeypatch.setattr(interface, "_way_to", lambda host: table.get({interface.ANYWHERE: "anywhere"}.get(host, host)))


def test_the_way_to_where_the_ranks_meet(monkeypatch):
    ways(monkeypatch, node1="172.16.3.5", anywhere="10.0.0.5")
    assert choose(None, "node1", PRESENT) == FABRIC


def test_a_name_that_stands_for_loopback_leads_nowhere(monkeypatch):
    """Debian gives a machine's own name 127.0.1.1: on the first node, the default route decides."""
    ways(monkeypatch, node1="127.0.0.1", anywhere="10.0.0.5")
    assert choose(None, "node1", PRESENT) == ETHERNET
    ways(monkeypatch, node1="127.0.0.1")
    assert choose(None, "node1", [LOOPBACK, FABRIC]) == FABRIC
    with pytest.raises(LaunchError, match=r"cannot be told from MASTER_ADDR=node1\. Set MEGATRAIN_INTERFACE"):
        choose(None, "node1", PRESENT)
    with pytest.raises(LaunchError, match="cannot be told"):
        choose(None, "node1", [LOOPBACK])


def test_ranks_of_several_machines_meet_at_an_address_that_is_not_loopback(machine, monkeypatch):
    meaning = {"node1": "127.0.1.1", "node2": "10.0.0.9"}

    def resolve(host, *words, **more):
        if host not in meaning:
            raise OSError("Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (meaning[host], 0))]

    monkeypatch.setattr(interface.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(interface, "_way_to", lambda host: "10.0.0.5" if host == interface.ANYWHERE else None)
    assert [interface.reached(host, {}) for host in ("node1", "node2", "node3")] == ["10.0.0.5", "node2", "node3"]
    assert interface.reached("node1", {"MEGATRAIN_INTERFACE": "ib0"}) == "172.16.3.5"
    apart = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "1",
    }
    assert interface.launched(apart).master_addr == "10.0.0.5"
    for same in ({"LOCAL_WORLD_SIZE": "2"}, {"TORCHELASTIC_USE_AGENT_STORE": "True"}):
        assert interface.launched(apart | same).master_addr == "node1"


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(interface, "interfaces", lambda: PRESENT)
    ways(monkeypatch, node1="10.0.0.5")


def test_backends_are_told(machine):
    env = {}
    assert use(NODES, env) == ETHERNET and env == {"GLOO_SOCKET_IFNAME": "eth0"}
    env = {"MEGATRAIN_INTERFACE": "ib0"}
    assert use(NODES, env) == FABRIC and (env["GLOO_SOCKET_IFNAME"], env["NCCL_SOCKET_IFNAME"]) == ("ib0", "=ib0")
    assert use(replace(NODES, local_world_size=4), {}) is None


def test_what_a_backend_was_told_stays(machine):
    env = {"GLOO_SOCKET_IFNAME": "ib0"}
    assert use(NODES, env) is None and env == {"GLOO_SOCKET_IFNAME": "ib0"}
    with pytest.raises(LaunchError, match="NCCL_SOCKET_IFNAME=ib7 is no interface of"):
        use(NODES, {"NCCL_SOCKET_IFNAME": "ib7"})


def test_other_machines_reach_this_one_where_the_backends_do(machine):
    env = {}
    use(NODES, env)
    assert interface.address_of_run(NODES, env) == ETHERNET.address
    assert interface.address_of_run(NODES, {"GLOO_SOCKET_IFNAME": "ib0,eth0"}) == FABRIC.address
    assert interface.address_of_run(NODES, {"MEGATRAIN_INTERFACE": "172.16.0.0/16"}) == FABRIC.address


@pytest.mark.parametrize("value", ["eth0", "eth", "=eth0", "^docker", "ib7,eth0"])
def test_names_as_backends_write_them(value):
    check_names({"NCCL_SOCKET_IFNAME": value}, ["lo", "eth0"])


def test_this_machine_has_loopback():
    assert any(one.is_loopback and one.address == "127.0.0.1" for one in interfaces())
