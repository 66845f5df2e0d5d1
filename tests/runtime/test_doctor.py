"""Every fault that is planted in the reports is named with its rank or node; what a machine says of itself is so."""

import os
import socket
from dataclasses import replace

import pytest
import torch

from megatrain.runtime.doctor import Report, as_json, judge, judge_alone, look, measure, write_speed

CPU = torch.device("cpu")
GOOD = Report(
    0,
    "node0",
    versions={"python": "3.11", "torch": "2.13.0"},
    devices=["H100"],
    interfaces=["lo", "eth0"],
    free_bytes=10**12,
    write_mb_per_second=500.0,
    clock_seconds=1000.0,
    tflops=600.0,
    all_reduce_mb_per_second=9000.0,
)


def world(**planted):
    """Eight ranks on four nodes, of which rank 5 has something else."""
    reports = [replace(GOOD, rank=n, node=f"node{n // 2}") for n in range(8)]
    reports[5] = replace(reports[5], **planted)
    return reports


def found(reports, size=10**9, kept=3):
    return [(finding.level, finding.message) for finding in judge(reports, size, kept)]


def test_nothing_is_found_where_nothing_is_wrong():
    assert found(world()) == []
    assert as_json(world(), [])["ok"] and len(as_json(world(), [])["ranks"]) == 8


@pytest.mark.parametrize(
    ("planted", "level", "said"),
    [
        (
            {"versions": {"python": "3.11", "torch": "2.11.0"}},
            "fail",
            "torch is not the same everywhere: rank 5 on node2 has 2.11.0",
        ),
        ({"devices": ["H200"]}, "warn", "rank 5 on node2 has H200, the others H100"),
        (
            {"directory_problem": "No space left on device"},
            "fail",
            "rank 5 on node2 cannot write checkpoint.dir: No space left on device",
        ),
        (
            {"sees_token": False},
            "fail",
            "not the same directory everywhere: node2 does not see what rank 0",
        ),
        ({"clock_seconds": 1030.0}, "warn", "the clock of rank 5 on node2 is +30.0 s from the others'"),
        ({"tflops": 300.0}, "warn", "rank 5 on node2 is slow: matrix products 300 TFLOP/s, the median is 600"),
        ({"write_mb_per_second": 20.0}, "warn", "rank 5 on node2 is slow: the disk of checkpoint.dir 20 MB/s"),
        (
            {"asked_interfaces": {"GLOO_SOCKET_IFNAME": "ib0"}},
            "fail",
            "rank 5 on node2: GLOO_SOCKET_IFNAME=ib0 is no interface",
        ),
    ],
)
def test_a_planted_fault_is_named(planted, level, said):
    (finding,) = found(world(**planted))
    assert finding[0] == level and said in finding[1]


@pytest.mark.parametrize("value", ["eth0", "eth", "=eth0", "^docker", "ib0,eth0"])
def test_interfaces_that_are_there(value):
    assert judge_alone(replace(GOOD, asked_interfaces={"NCCL_SOCKET_IFNAME": value})) == []


def test_space_for_checkpoints():
    assert found(world(), size=10**12 // 5, kept=3) == []
    ((level, said),) = found(world(), size=10**12 // 4 + 1, kept=3)
    assert level == "warn" and "Set checkpoint.keep=2" in said
    ((level, said),) = found(world(), size=6 * 10**11)
    assert level == "fail" and "has 1000.0 GB free, and two checkpoints take 1200.0 GB" in said
    assert found(world(), size=0) == [] and found(world(), size=10**11, kept=0) == []


def test_failures_come_first():
    reports = world(tflops=1.0, sees_token=False)
    assert [level for level, _ in found(reports)] == ["fail", "warn"]


def test_what_this_machine_is(tmp_path):
    report = look(0, CPU, tmp_path / "new", {"GLOO_SOCKET_IFNAME": "nope0"})
    assert report.node == socket.gethostname() and report.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "lo" in report.interfaces and report.free_bytes > 0 and report.write_mb_per_second > 0 and "gloo" in report.backends
    assert not list((tmp_path / "new").iterdir())
    (finding,) = judge_alone(report)
    assert "GLOO_SOCKET_IFNAME=nope0 is no interface here" in finding.message
    measure(report, None, CPU, tmp_path)
    assert report.tflops > 0 and report.sees_token and not list(tmp_path.glob(".doctor*"))


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    report = look(0, CPU, tmp_path / "file" / "below", {})
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
