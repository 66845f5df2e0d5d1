"""Reads SLURM's short forms: node lists, task counts, and the end of a job."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping

ASK_SECONDS = 30
"""Time limit for an answer of the controller, which may be busy."""


def expand_nodes(nodes: str) -> list[str]:
    """Host names of a SLURM node list: `a[1-2,07],b` is a1, a2, a07, b; zeros and several brackets in one name are kept.

    Raises ValueError where the text is no node list.
    """
    hosts = [host for part in _split_outside_brackets(nodes) for host in _expand_one(part)]
    if not hosts:
        raise ValueError(f"{nodes!r} names no node")
    return hosts


def expand_tasks(tasks: str) -> list[int]:
    """Tasks of each node: `2(x3),1` is 2, 2, 2, 1. Raises ValueError if the text is not such a list."""
    counts: list[int] = []
    for part in tasks.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(f"{tasks!r} is no list of task counts such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def port_of_job(job_id: int) -> int:
    """A port from 20000 to 32767, below those that Linux hands out itself; jobs with neighbouring numbers get different ones."""
    return 20000 + job_id % 12768


def address_of(node: str) -> str:
    """A name or address at which a node can be reached: its name if it resolves, else NodeAddr of SLURM's configuration."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        said = re.search(r"\bNodeAddr=(\S+)", _ask_controller("show", "node", "--oneliner", node))
        return node if said is None else said[1]


def job_end(env: Mapping[str, str]) -> float | None:
    """The end of this process's job, in seconds since 1970; None outside of SLURM, without a limit, or if unknown.

    Asks the controller, since a limit may be changed while the job runs; without an answer reads SLURM_JOB_END_TIME, which newer versions
    set.
    """
    job = env.get("SLURM_JOB_ID")
    if not job:
        return None
    said = re.search(r"\bEndTime=(\d[\dT:-]+)", _ask_controller("show", "job", "--oneliner", job))
    if said is not None:
        return time.mktime(time.strptime(said[1], "%Y-%m-%dT%H:%M:%S"))
    end = env.get("SLURM_JOB_END_TIME", "")
    return float(end) if end.isdecimal() and int(end) > 0 else None


def _ask_controller(*words: str) -> str:
    """The output of scontrol; empty if it is not installed or fails."""
    if not shutil.which("scontrol"):
        return ""
    try:
        return subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=ASK_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _split_outside_brackets(nodes: str) -> list[str]:
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodes)
    if ",".join(parts) != nodes.strip():
        raise ValueError(f"{nodes!r} is no node list such as node[01-04,07],login1")
    return parts


def _expand_one(part: str) -> list[str]:
    """All names of one part of a node list: its first bracket is replaced by each of its numbers, then the rest is expanded likewise."""
    head, bracket, rest = part.partition("[")
    if not bracket:
        return [part.strip()]
    inside, _, tail = rest.partition("]")
    return [head.strip() + number + end for number in _expand_numbers(inside) for end in _expand_one(tail)]


def _expand_numbers(numbers: str) -> list[str]:
    result = []
    for part in numbers.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise ValueError(f"{part!r} is no range of node numbers such as 01-04")
        result += [str(n).zfill(len(match[1])) for n in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return result
