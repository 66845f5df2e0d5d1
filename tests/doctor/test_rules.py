"""Every fault that is planted in made-up reports is named with its rank or node."""

import json
from dataclasses import replace

import pytest

from megatrain.doctor.measure import Report
from megatrain.doctor.rules import as_json, judge, judge_apart, judge_missing, names

GOOD = Report(
    0,
    "node0",
    local_world_size=2,
    versions={"python": "3.11", "torch": "2.13.0"},
    devices=["H100"],
    kernels="triton",
    backend="nccl on cuda",
    interfaces={"lo": ["127.0.0.1"], "eth0": ["10.0.0.1", "fd00::1"], "ib1": []},
    free_bytes=10**12,
    write_mb_per_second=500.0,
    clock_seconds=1000.0,
    tflops=600.0,
    all_reduce_mb_per_second=9000.0,
)


def good_world(nodes=4):
    """Two ranks a node; each has links to the rank of its place on the nodes before and after."""
    size = 2 * nodes
    return [
        replace(
            GOOD,
            rank=n,
            node=f"node{n // 2}",
            links_mb_per_second={str((n - 2) % size): 900.0, str((n + 2) % size): 1000.0},
        )
        for n in range(size)
    ]


def world(ranks=(5,), nodes=4, **planted):
    """A good world of which some ranks have something else."""
    reports = good_world(nodes)
    for rank in ranks:
        reports[rank] = replace(reports[rank], **planted)
    return reports


def found(reports, size=10**9, kept=3):
    return [(finding.level, finding.message) for finding in judge(reports, size, kept)]


def test_nothing_is_found_where_nothing_is_wrong():
    assert found(good_world()) == []
    assert as_json(good_world(), [])["ok"] and len(as_json(good_world(), [])["ranks"]) == 8


FAULTS = [
    ({"problems": ["cuda:1 does not compute"]}, "fail", ": cuda:1 does not compute"),
    ({"backend": "gloo on cpu"}, "fail", ": would use gloo on cpu, the others nccl on cuda"),
    ({"versions": {"python": "3.11", "torch": "2.11.0"}}, "fail", ": torch 2.11.0, the others 2.13.0"),
    ({"directory_problem": "No space left on device"}, "fail", ": cannot write checkpoint.dir: No space left on device"),
    ({"sees_token": False}, "fail", ": what rank 0 on node0 wrote in checkpoint.dir is not there"),
    ({"asked_interfaces": {"GLOO_SOCKET_IFNAME": "ib0"}}, "fail", ": GLOO_SOCKET_IFNAME=ib0 names no interface"),
    ({"devices": ["H200"]}, "warn", ": H200, the others H100"),
    (
        {"kernels": "plain PyTorch: Triton is not installed"},
        "warn",
        ": kernels: plain PyTorch: Triton is not installed, the others",
    ),
    ({"clock_seconds": 1030.0}, "warn", ": the clock is +30.0 s from the others'"),
    ({"tflops": 300.0}, "warn", ": slow: matrix products 300 TFLOP/s, the median is 600"),
    ({"write_mb_per_second": 20.0}, "warn", ": slow: the disk of checkpoint.dir 20 MB/s"),
]


@pytest.mark.parametrize(("planted", "level", "said"), FAULTS)
def test_a_planted_fault_is_named(planted, level, said):
    """With the rank, or with the node, once, where it is all of its ranks'; and with both in the JSON."""
    for ranks, who in ((5,), "rank 5 on node2"), ((2, 3), "node1 (all 2 ranks)"):
        reports = world(ranks, **planted)
        (finding,) = judge(reports, 10**9, 3)
        assert finding.level == level and finding.message.startswith(who) and said in finding.message
        (row,) = json.loads(json.dumps(as_json(reports, [finding])))["findings"]
        assert row["ranks"] == list(ranks) and row["nodes"] == [f"node{ranks[0] // 2}"]


def test_of_two_ranks_that_differ_one_is_named():
    two = [replace(GOOD, local_world_size=1), replace(GOOD, rank=1, node="node1", clock_seconds=1030.0, tflops=400.0)]
    assert [said.partition(":")[0] for _, said in found(two)] == ["rank 1 on node1"] * 2


def test_what_was_not_measured_is_not_slow():
    """Where ranks could not join there are no speeds and clocks: the rules must not make faults of that."""
    nothing = {"tflops": 0.0, "clock_seconds": 0.0, "all_reduce_mb_per_second": 0.0, "links_mb_per_second": {}}
    assert found([replace(report, **nothing) for report in good_world()]) == []
    assert found(world(**nothing)) == []


def test_names_of_many():
    reports = good_world(nodes=50)
    assert names(reports[2:5], reports) == "node1 (all 2 ranks), rank 4 on node2"
    assert names(reports[1::2], reports).startswith("rank 1 on node0, ") and names(reports[1::2], reports).endswith(
        "and 34 more"
    )
    assert len(names(reports, reports)) < 400


@pytest.mark.parametrize(
    ("key", "value", "serves"),
    [
        ("NCCL", "eth0", True),
        ("NCCL", "eth", True),
        ("NCCL", "=eth0", True),
        ("NCCL", "=eth", False),
        ("NCCL", "^docker", True),
        ("NCCL", "ib0,eth0", True),
        ("NCCL", "ib0", False),
        ("GLOO", "eth0", True),
        ("GLOO", "lo,eth0", True),
        ("GLOO", "ib0,eth0", False),  # gloo opens every one of the list
        ("GLOO", "eth", False),
        ("GLOO", "ib1", False),  # it is there, without an address
    ],
)
def test_names_of_interfaces(key, value, serves):
    report = replace(GOOD, asked_interfaces={f"{key}_SOCKET_IFNAME": value})
    assert (judge_apart([report]) == []) is serves


def test_a_whole_node_without_gpus_says_why_and_not_that_it_is_different():
    reports = world((2, 3), problems=["parallel.device=cuda, but PyTorch finds no GPU here."], backend="")
    ((level, said),) = found(reports)
    assert level == "fail" and said == "node1 (all 2 ranks): parallel.device=cuda, but PyTorch finds no GPU here."


def test_ranks_that_did_not_come():
    reports = [report for report in good_world() if report.rank not in (1, 4, 5)]
    assert judge_missing(good_world(), 8, 60.0, ["node0"], "Were they started?") == []
    (finding,) = judge_missing(reports, 8, 60.0, ["node0", "node1", "node2", "node3"], "Were they started?")
    assert finding.message.startswith(
        "ranks 1, 4, 5 sent no report within 60 s; of the 2 ranks on node0, 1 did; none on node2 did. Were they started?"
    )
    assert finding.level == "fail" and finding.ranks == (1, 4, 5) and finding.nodes == ("node0", "node2")


def test_links():
    """One end is slow with all its neighbours: its node is named; both ends are fast elsewhere: the link is."""
    reports = good_world()
    reports[4] = replace(reports[4], links_mb_per_second={"2": 100.0, "6": 120.0})
    reports[2] = replace(reports[2], links_mb_per_second={"0": 900.0, "4": 100.0})
    reports[6] = replace(reports[6], links_mb_per_second={"0": 900.0, "4": 120.0})
    ((level, said),) = found(reports)
    assert level == "warn" and said.startswith("rank 4 on node2: slow: links to other nodes 120 MB/s, the median is 1000")
    reports[4] = replace(reports[4], links_mb_per_second={"2": 100.0, "6": 900.0})
    reports[6] = replace(reports[6], links_mb_per_second={"0": 900.0, "4": 900.0})
    ((level, said),) = found(reports)
    assert level == "warn" and said.startswith("the link between node1 and node2 is slow: 100 MB/s")


def test_space_for_checkpoints():
    assert found(good_world(), size=10**12 // 5, kept=3) == []
    ((level, said),) = found(good_world(), size=10**12 // 4 + 1, kept=3)
    assert level == "warn" and "Set checkpoint.keep=2" in said
    ((level, said),) = found(good_world(), size=6 * 10**11)
    assert level == "fail" and "rank 0 on node0: checkpoint.dir has 1000 GB free, and two checkpoints take 1200 GB" in said
    assert found(good_world(), size=0) == [] and found(good_world(), size=10**11, kept=0) == []
    ((level, said),) = found(world(free_bytes=10**9))
    assert level == "fail" and "rank 5 on node2: checkpoint.dir has 1 GB free" in said


def test_failures_come_first():
    reports = world(tflops=1.0, sees_token=False)
    assert [level for level, _ in found(reports)] == ["fail", "warn"]
