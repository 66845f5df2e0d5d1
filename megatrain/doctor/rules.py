"""The rules of `megatrain doctor`: from the reports of all ranks, what would make a job fail or slow. Touches no machine.

Each kind of fault has a rule. A finding names its ranks, or the node where all ranks of the node share it, and covers all of them at once.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatrain.doctor.measure import Report
from megatrain.runtime.interface import serves

SLOW = 0.75
"""A rank whose matrix products are slower than this share of the median gets a finding."""
SLOW_PATH = 0.5
"""The same share for disks and links, whose speeds vary more between measurements."""
SKEWED_SECONDS = 2.0
"""A larger difference between clocks makes logs and timeouts hard to read."""
SHOWN = 16
"""Most names listed in a message; --json gives all."""


@dataclass(frozen=True)
class Finding:
    """One fault, with the ranks and nodes that have it."""

    level: Literal["fail", "warn"]
    """fail: a job would not run, or would lose its work."""
    message: str
    ranks: tuple[int, ...]
    """The ranks at fault."""
    nodes: tuple[str, ...]
    """The nodes of these ranks."""


def judge_apart(reports: Sequence[Report]) -> list[Finding]:
    """Findings that keep ranks from joining a group, from the readings that each rank took of its own machine."""
    said: dict[str, list[Report]] = {}
    for report in reports:
        for problem in [*report.problems, *name_wrong_interfaces(report)]:
            said.setdefault(problem, []).append(report)
    found = [_finding("fail", who, reports, f": {problem}") for problem, who in said.items()]
    able = [report for report in reports if report.backend]
    for who, theirs, usual in _unlike(able, lambda report: report.backend):
        text = f": would use {theirs}, the others {usual}. Set parallel.device and parallel.backend."
        found.append(_finding("fail", who, reports, text))
    return found


def name_wrong_interfaces(report: Report) -> list[str]:
    """Problems with the network interfaces that the environment tells the backends to use on a rank."""
    return [
        f"{key}={value} names no interface with an address there; there are {', '.join(_addressed(report.interfaces))}. "
        f"Set {key} to one of them."
        for key, value in report.asked_interfaces.items()
        if not serves(key, value, _addressed(report.interfaces))
    ]


def judge_missing(reports: Sequence[Report], size: int, seconds: float, nodes: Sequence[str], advice: str) -> list[Finding]:
    """The finding that ranks of a world of `size` have sent no report within `seconds`; [] if all have."""
    here = {report.rank for report in reports}
    missing = [rank for rank in range(size) if rank not in here]
    if not missing:
        return []
    came = _by_node(reports)
    some = [(node, len(who), who[0].local_world_size) for node, who in came.items() if len(who) < who[0].local_world_size]
    seen = {node.partition(".")[0] for node in came}
    absent = [node for node in nodes if node.partition(".")[0] not in seen]
    message = f"{'ranks' if len(missing) > 1 else 'rank'} {_listed(missing)} sent no report within {seconds:g} s"
    message += "".join(f"; of the {expected} ranks on {node}, {number} did" for node, number, expected in some[:SHOWN])
    message += f"; none on {_listed(absent)} did" if absent else ""
    return [
        Finding("fail", f"{message}. {advice}", tuple(missing), tuple(dict.fromkeys([*(node for node, _, _ in some), *absent])))
    ]


def judge(reports: Sequence[Report], checkpoint_bytes: int, kept: int) -> list[Finding]:
    """All findings, failures first. checkpoint_bytes: size of a whole checkpoint; kept: checkpoint.keep, 0 for all."""
    found = judge_apart(reports)
    for rule in (_versions, _devices, _directories, _doubts, _clocks, _speeds, _links):
        found += rule(reports)
    found += _space(reports, checkpoint_bytes, kept)
    return sorted(found, key=lambda finding: finding.level)


def as_json(reports: Sequence[Report], findings: Sequence[Finding]) -> dict[str, Any]:
    """Reports and findings as one dictionary, for --json."""
    ok = not any(finding.level == "fail" for finding in findings)
    return {"ok": ok, "findings": [asdict(finding) for finding in findings], "ranks": [asdict(report) for report in reports]}


# --- names -----------------------------------------------------------------------------------------------------------------


def names(some: Sequence[Report], everyone: Sequence[Report]) -> str:
    """The ranks of `some` as text: `rank 5 on node2`, or `node2 (all 8 ranks)` if they are all of a node's several ranks."""
    sizes = Counter(report.node for report in everyone)
    words = []
    for node, who in _by_node(some).items():
        if len(who) == sizes[node] > 1:
            words.append(f"{node} (all {len(who)} ranks)")
        else:
            words.append(f"{'ranks' if len(who) > 1 else 'rank'} {_listed(report.rank for report in who)} on {node}")
    return _listed(words)


def _listed(words: Iterable[object]) -> str:
    """Joined by commas; after the first SHOWN, the number of the rest."""
    every = [str(word) for word in words]
    return ", ".join(every[:SHOWN]) + (f" and {len(every) - SHOWN} more" if len(every) > SHOWN else "")


def short(number: float) -> str:
    """Three significant digits; from 100 on the whole number."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def size(number: float) -> str:
    """A number of bytes in MB or GB, for messages."""
    return f"{short(number / 1e9)} GB" if number >= 1e9 else f"{short(number / 1e6)} MB"


def _by_node(reports: Iterable[Report]) -> dict[str, list[Report]]:
    nodes: dict[str, list[Report]] = {}
    for report in reports:
        nodes.setdefault(report.node, []).append(report)
    return nodes


def _finding(level: Literal["fail", "warn"], who: Sequence[Report], everyone: Sequence[Report], text: str) -> Finding:
    """A finding about the reports `who`, whose names begin the message."""
    return Finding(level, names(who, everyone) + text, tuple(report.rank for report in who), tuple(_by_node(who)))


def _unlike(reports: Sequence[Report], value: Callable[[Report], str]) -> list[tuple[list[Report], str, str]]:
    """(reports, their value, the most common value) for each value that is not the most common one."""
    if not reports:
        return []
    usual = Counter(value(report) for report in reports).most_common(1)[0][0]
    others: dict[str, list[Report]] = {}
    for report in reports:
        if value(report) != usual:
            others.setdefault(value(report), []).append(report)
    return [(who, theirs, usual) for theirs, who in others.items()]


# --- rules ----------------------------------------------------------------------------------------------------------------


def _addressed(interfaces: Mapping[str, Sequence[str]]) -> list[str]:
    return [name for name, addresses in interfaces.items() if addresses]


def _versions(reports: Sequence[Report]) -> list[Finding]:
    found = []
    for package in dict.fromkeys(name for report in reports for name in report.versions):
        others = _unlike(reports, lambda report, package=package: report.versions.get(package, "none"))  # type: ignore[misc]
        for who, theirs, usual in others:
            text = f": {package} {theirs}, the others {usual}. Install one version."
            found.append(_finding("fail", who, reports, text))
        if not others and reports[0].versions.get(package) == "not installed":
            text = f": {package} is not installed. pip install -c launch/constraints.txt -e ."
            found.append(_finding("fail", reports, reports, text))
    return found


def _devices(reports: Sequence[Report]) -> list[Finding]:
    kinds: tuple[Callable[[Report], str], ...] = (
        lambda r: ", ".join(r.devices) or "no device",
        lambda r: f"kernels: {r.kernels}",
    )
    return [
        _finding("warn", who, reports, f": {theirs}, the others {usual}.")
        for value in kinds
        for who, theirs, usual in _unlike(reports, value)
    ]


def _directories(reports: Sequence[Report]) -> list[Finding]:
    said: dict[str, list[Report]] = {}
    for report in reports:
        if report.directory_problem:
            said.setdefault(report.directory_problem, []).append(report)
    found = [
        _finding(
            "fail",
            who,
            reports,
            f": cannot write checkpoint.dir: {why}. Set checkpoint.dir to a directory that can be written.",
        )
        for why, who in said.items()
    ]
    blind = [report for report in reports if not report.sees_token]
    if blind:
        text = (
            f": what rank 0 on {reports[0].node} wrote in checkpoint.dir is not there: it is not the same directory everywhere. Set "
            "checkpoint.dir to one on a shared file system."
        )
        found.append(_finding("fail", blind, reports, text))
    return found


def _doubts(reports: Sequence[Report]) -> list[Finding]:
    return [_finding("warn", [report], reports, f": {doubt}") for report in reports for doubt in report.doubts]


def _clocks(reports: Sequence[Report]) -> list[Finding]:
    met = [report for report in reports if report.clock_seconds]
    # A median that is one of the clocks, not a mean of two: if two ranks differ, one of them gets the finding.
    middle = statistics.median_low(report.clock_seconds for report in met) if met else 0.0
    wrong = [report for report in met if abs(report.clock_seconds - middle) > SKEWED_SECONDS]
    return [
        _finding(
            "warn", who, reports, f": the clock is {who[0].clock_seconds - middle:+.1f} s from the others'. Start NTP there."
        )
        for who in _by_node(wrong).values()
    ]


def _speeds(reports: Sequence[Report]) -> list[Finding]:
    """Findings about ranks whose compute, links or disk are slow, one for each node."""
    measures: tuple[tuple[str, str, float, Callable[[Report], float]], ...] = (
        ("matrix products", "TFLOP/s", SLOW, lambda report: report.tflops),
        ("links to other nodes", "MB/s", SLOW_PATH, lambda report: report.link_mb_per_second),
        ("the disk of checkpoint.dir", "MB/s", SLOW_PATH, lambda report: report.write_mb_per_second),
    )
    found = []
    for what, unit, share, value in measures:
        measured = [report for report in reports if value(report)]
        middle = statistics.median_high(value(report) for report in measured) if measured else 0.0
        for who in _by_node(report for report in measured if value(report) < share * middle).values():
            least, most = short(min(map(value, who))), short(max(map(value, who)))
            reached = least if least == most else f"{least} to {most}"
            text = f": slow: {what} {reached} {unit}, the median is {short(middle)}. All will wait for it."
            found.append(_finding("warn", who, reports, text))
    return found


def _links(reports: Sequence[Report]) -> list[Finding]:
    """Findings about links between two nodes that are slow although both nodes are faster with their other neighbour."""
    by_rank = {report.rank: report for report in reports}
    slow: dict[tuple[str, str], float] = {}
    for report in reports:
        for peer, speed in report.links_mb_per_second.items():
            other = by_rank[int(peer)]
            if report.rank < other.rank and speed < SLOW_PATH * min(report.link_mb_per_second, other.link_mb_per_second):
                pair = report.node, other.node
                slow[pair] = min(speed, slow.get(pair, speed))
    return [
        Finding(
            "warn",
            f"the link between {first} and {second} is slow: {short(speed)} MB/s, though each of them is faster with its other "
            "neighbour. Look at the switches between them.",
            (),
            (first, second),
        )
        for (first, second), speed in slow.items()
    ]


def _space(reports: Sequence[Report], checkpoint_bytes: int, kept: int) -> list[Finding]:
    able = [report for report in reports if not report.directory_problem]
    if not able or not checkpoint_bytes:
        return []
    least = min(able, key=lambda report: report.free_bytes)  # they differ where the directory is not shared
    room = f": checkpoint.dir has {size(least.free_bytes)} free"
    if least.free_bytes < 2 * checkpoint_bytes:  # the finished one and the one being written
        text = (
            f"{room}, and two checkpoints take {size(2 * checkpoint_bytes)}. Free some, or set checkpoint.dir to a larger disk."
        )
        return [_finding("fail", [least], reports, text)]
    if kept and least.free_bytes < (kept + 1) * checkpoint_bytes:
        text = (
            f"{room}, and checkpoint.keep={kept} with one being written takes {size((kept + 1) * checkpoint_bytes)}. "
            f"Set checkpoint.keep={max(1, int(least.free_bytes / checkpoint_bytes) - 1)}."
        )
        return [_finding("warn", [least], reports, text)]
    return []
