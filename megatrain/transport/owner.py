"""Tells a process from a later one with the same number: whether the owner of a lock, or of a file in shared memory, still lives."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Owner:
    """A process of some machine."""

    machine: str
    """Differs between machines and between containers, each of which has process numbers of its own."""
    pid: int
    born: str
    """Start time in /proc, in clock ticks since the machine started; empty if there is no /proc."""

    @classmethod
    def of(cls, pid: int) -> Owner:
        """The process that has the number `pid` now, on this machine."""
        return cls(machine(), pid, process(pid)[1])

    def condition(self) -> Literal["gone", "stopped", "running", "elsewhere"]:
        """The state of the process; elsewhere: on another machine, or unknown because there is no /proc."""
        if self.machine != machine() or not self.born:
            return "elsewhere"
        state, born = process(self.pid)
        if born != self.born or state in ("Z", "X"):
            return "gone"
        return "stopped" if state in ("T", "t") else "running"


def own() -> Owner:
    """This process."""
    return Owner.of(os.getpid())


def process(pid: int) -> tuple[str, str]:
    """State letter and start time (clock ticks since boot) of a process; empty if it does not exist."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def machine() -> str:
    """A name for this machine and, in a container, for its numbering of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()}/{sys.platform}"
