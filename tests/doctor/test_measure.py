"""What a machine says of itself is so; what ranks measure among each other is what was planted there."""

import os
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from megatrain.doctor import measure as measuring
from megatrain.doctor.measure import Report, look, measure, neighbours, write_speed
from megatrain.doctor.rules import judge, judge_apart
from megatrain.testing import simulate

CPU = torch.device("cpu")


def looked(directory, rank=0, env=None, node=None) -> Report:
    report = Report(rank, node or socket.gethostname())
    look(report, CPU, directory, env or {})
    return report


def test_what_this_machine_is(tmp_path):
    report = looked(tmp_path / "new", env={"GLOO_SOCKET_IFNAME": "nope0"})
    assert report.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report.free_bytes > 0 and report.write_mb_per_second > 0 and "gloo" in report.backends
    assert "127.0.0.1" in report.interfaces["lo"] and report.problems == []
    assert set(report.interfaces) == {name for _, name in socket.if_nameindex()}
    assert not list((tmp_path / "new").iterdir())
    (finding,) = judge_apart([report])
    assert "GLOO_SOCKET_IFNAME=nope0 names no interface" in finding.message
    measure(report, None, CPU, tmp_path)
    assert report.tflops > 0 and report.sees_token and not list(tmp_path.glob(".doctor*"))


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    report = looked(tmp_path / "file" / "below")
    assert report.directory_problem
    measure(report, None, CPU, tmp_path / "file" / "below")
    assert "cannot write checkpoint.dir" in judge([report], 0, 3)[0].message


def test_the_test_file_is_removed_where_the_disk_is_full(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_speed(tmp_path, 0)
    assert not list(tmp_path.iterdir())


# --- among others -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1], [4], [1, 1], [2, 2], [1, 1, 1], [2] * 4, [2] * 5, [3, 1, 2], [8] * 16])
def test_neighbours_are_pairs_and_the_rounds_a_ring(sizes):
    nodes = [f"node{n}" for n, size in enumerate(sizes) for _ in range(size)]
    rounds = [neighbours(nodes, rank) for rank in range(len(nodes))]
    assert len({len(row) for row in rounds}) == 1 and len(rounds[0]) <= 3
    links = set()
    for rank, row in enumerate(rounds):
        for turn, peer in enumerate(row):
            assert peer is None or (rounds[peer][turn] == rank and nodes[peer] != nodes[rank])
            links |= {frozenset((nodes[rank], nodes[peer]))} if peer is not None else set()
        assert sum(peer is not None for peer in row) <= 2
    ring = {frozenset((f"node{n}", f"node{(n + 1) % len(sizes)}")) for n in range(len(sizes))}
    assert links == {link for link in ring if len(link) == 2}


def measured(directories, nodes, monkeypatch, delay=lambda rank, to: 0.0) -> list[Report]:
    """Reports of simulated ranks, whose messages take longer by `delay(rank, to)` seconds; products cost no time.

    A rank's clock goes on by 0.1 ms whenever it is read, and by the delay of what the rank sends: a busy machine delays nothing.
    """
    clock = threading.local()

    def goes_on(seconds=1e-4) -> float:
        clock.seconds = getattr(clock, "seconds", 0.0) + seconds
        return clock.seconds

    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=goes_on, time=time.time, time_ns=time.time_ns))
    monkeypatch.setattr(measuring, "_matmul_speed", lambda device: 1.0)
    monkeypatch.setattr(measuring, "DISK_TEST_BYTES", 1 << 20)
    monkeypatch.setattr(measuring, "MESSAGE_NUMBERS", 1 << 10)

    def rank(ctx):
        group = ctx.world.group
        send = group.send

        def slow_send(tensor, to, **how):
            goes_on(delay(group.rank, to))
            return send(tensor, to, **how)

        group.send = slow_send
        report = looked(directories[group.rank], group.rank, node=nodes[group.rank])
        measure(report, group, CPU, directories[group.rank])
        return report

    return simulate(len(nodes), rank, in_turns=False)


def test_directories_that_are_not_the_same(tmp_path, monkeypatch):
    paths = [tmp_path / "shared", tmp_path / "shared", tmp_path / "own"]
    paths[2].mkdir()
    reports = measured(paths, ["a", "a", "b"], monkeypatch)
    assert [report.sees_token for report in reports] == [True, True, False]
    assert all(list(path.iterdir()) == [] for path in paths)


def test_others_are_not_blamed_where_rank_0_cannot_write(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    reports = measured([tmp_path / "file" / "below", tmp_path], ["a", "b"], monkeypatch)
    assert [bool(report.directory_problem) for report in reports] == [True, False] and reports[1].sees_token


def test_a_node_with_a_slow_link_is_named(tmp_path, monkeypatch):
    """Two ranks a node on four nodes; all messages of node 2 take 50 ms more, there and back."""
    nodes = [f"node{n // 2}" for n in range(8)]
    reports = measured([tmp_path] * 8, nodes, monkeypatch, lambda rank, to: 0.05 * ("node2" in (nodes[rank], nodes[to])))
    (found,) = [finding for finding in judge(reports, 0, 3) if "link" in finding.message]
    assert found.message.startswith("node2 (all 2 ranks): slow: links to other nodes") and found.ranks == (4, 5)


def test_a_slow_link_between_two_good_nodes_is_named(tmp_path, monkeypatch):
    nodes = [f"node{n}" for n in range(4)]
    reports = measured([tmp_path] * 4, nodes, monkeypatch, lambda rank, to: 0.05 * ({rank, to} == {1, 2}))
    (found,) = [finding for finding in judge(reports, 0, 3) if "link" in finding.message]
    assert found.message.startswith("the link between node1 and node2 is slow") and found.nodes == ("node1", "node2")
