"""Reads SLURM's short forms: node lists, task counts, and the end of a job.

A short form may stand for more than a machine holds: what it comes to is counted before anything is made of it.
"""

from __future__ import annotations

import itertools
import math
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping

from megatrain.runtime.variables import DIGITS, cut

MOST_NODES = 1 << 16
"""SLURM itself has at most 65,533."""
LONGEST_NAME = 253
"""Letters of a host name (RFC 1035)."""
ASK_SECONDS = 30
"""Time limit for an answer of the controller, which may be busy."""


def expand_nodes(nodes: str) -> list[str]:
    """Host names of a SLURM node list: `a[1-2,07],b` is a1, a2, a07, b; zeros and several brackets in one name are kept.

    Raises ValueError where the text is no node list, or one of more than MOST_NODES.
    """
    hosts: list[str] = []
    for part in _split_outside_brackets(nodes):
        pieces = [_ranges(text) if n % 2 else text for n, text in enumerate(re.split(r"\[([^\[\]]*)\]", part.strip()))]
        if sum(_length(piece) for piece in pieces) > LONGEST_NAME:
            raise ValueError(f"{cut(nodes)} has a name of more than {LONGEST_NAME} letters, which no host has")
        _require_few(nodes, len(hosts) + math.prod(1 if isinstance(piece, str) else _count(piece) for piece in pieces))
        choices = [[piece] if isinstance(piece, str) else _numbers(piece) for piece in pieces]
        hosts += ["".join(chosen) for chosen in itertools.product(*choices)]
    if not hosts:
        raise ValueError(f"{cut(nodes)} names no node")
    return hosts


def expand_tasks(tasks: str) -> list[int]:
    """Tasks of each node: `2(x3),1` is 2, 2, 2, 1. Raises ValueError if the text is not such a list, or one of more than MOST_NODES."""
    counts: list[int] = []
    for part in tasks.split(","):
        match = re.fullmatch(rf"({DIGITS})(?:\(x({DIGITS})\))?", part.strip())
        if match is None:
            raise ValueError(f"{cut(tasks)} is no list of task counts such as 2(x3),1")
        _require_few(tasks, len(counts) + int(match[2] or 1))
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
    except (OSError, UnicodeError):  # a part of more than 63 letters
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
    return float(end) if re.fullmatch(DIGITS, end) and int(end) > 0 else None


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
        raise ValueError(f"{cut(nodes)} is no node list such as node[01-04,07],login1")
    return parts


_Ranges = list[tuple[int, range]]
"""The inside of a bracket: (digits, numbers) of each of its parts."""


def _ranges(inside: str) -> _Ranges:
    found = []
    for part in inside.split(","):
        match = re.fullmatch(rf"({DIGITS})(?:-({DIGITS}))?", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise ValueError(f"{cut(part)} is no range of node numbers such as 01-04")
        found.append((len(match[1]), range(int(match[1]), int(match[2] or match[1]) + 1)))
    return found


def _length(piece: str | _Ranges) -> int:
    """Letters of a piece of a name, or of the longest number in its place."""
    return len(piece) if isinstance(piece, str) else max(max(digits, len(str(numbers[-1]))) for digits, numbers in piece)


def _count(ranges: _Ranges) -> int:
    return sum(len(numbers) for _, numbers in ranges)


def _numbers(ranges: _Ranges) -> list[str]:
    return [str(n).zfill(digits) for digits, numbers in ranges for n in numbers]


def _require_few(text: str, nodes: int) -> None:
    if nodes > MOST_NODES:
        raise ValueError(f"{cut(text)} stands for more than {MOST_NODES:,} nodes")
