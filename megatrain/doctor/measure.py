"""The readings and measurements of `megatrain doctor` on each rank.

Each rank reads the properties of its own machine (`look`) before any group exists, then measures together with the others (`measure`).
`rules.py` judges the reports of all ranks without touching a machine.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from megatrain.kernels.dispatch import require
from megatrain.kernels.matmul import matmul
from megatrain.runtime.interface import BACKENDS
from megatrain.transport.consensus import broadcast_text, gather_texts
from megatrain.transport.group import Group
from megatrain.transport.processes import backends

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "pyyaml", "megatrain")
DISK_TEST_BYTES = 64 << 20
MESSAGE_NUMBERS = 4 << 20
"""Float32 numbers in the measured all-reduce, and in a message between nodes."""


@dataclass
class Report:
    """The findings of one rank about itself and its machine."""

    rank: int
    node: str
    local_world_size: int = 1
    """Ranks that the launcher says are on this node."""
    problems: list[str] = field(default_factory=list)
    """Reasons why a job would fail on this rank: its config, device or port."""
    doubts: list[str] = field(default_factory=list)
    """Things that may be wrong; each becomes a warning."""
    versions: dict[str, str] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    kernels: str = ""
    """The ones that serve a run in BF16: `triton`, `numba`, or `plain PyTorch` and why no compiled ones."""
    backends: list[str] = field(default_factory=list)
    """The libraries for collectives (gloo, nccl) that torch has."""
    backend: str = ""
    """The backend and device type that this rank would use: `nccl on cuda`."""
    interfaces: dict[str, list[str]] = field(default_factory=dict)
    """Name -> its IPv4 and IPv6 addresses."""
    asked_interfaces: dict[str, str] = field(default_factory=dict)
    """Environment variable that selects network interfaces (NCCL_SOCKET_IFNAME ...) -> its value."""
    interface: str = ""
    """The interface chosen for messages between ranks; empty where the backend chooses."""
    free_bytes: int = 0
    write_mb_per_second: float = 0.0
    directory_problem: str = ""
    """Why checkpoint.dir cannot be written; empty if it can."""
    sees_token: bool = True
    """Whether this rank sees a file that rank 0 wrote in checkpoint.dir."""
    clock_seconds: float = 0.0
    """This machine's time (Unix, seconds) just after a barrier of all ranks; 0 before."""
    tflops: float = 0.0
    """Speed of a matrix product. Here and below, 0 means not measured."""
    all_reduce_mb_per_second: float = 0.0
    links_mb_per_second: dict[str, float] = field(default_factory=dict)
    """Rank on a neighbouring node -> speed of messages to it and back."""

    @property
    def name(self) -> str:
        """`rank N on NODE`, for messages."""
        return f"rank {self.rank} on {self.node}"

    @property
    def link_mb_per_second(self) -> float:
        """Speed of the fastest measured link to another node, as a bound on this rank's own network port; 0 without any."""
        return max(self.links_mb_per_second.values(), default=0.0)


def look(report: Report, device: torch.device, directory: Path, env: Mapping[str, str]) -> None:
    """Fill in the readings of this machine: versions, backends, devices, interfaces, disk. Joins no group."""
    report.versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            report.versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            report.versions[package] = "not installed"
    _look_at_device(report, device)
    report.kernels = require("auto", device, torch.bfloat16)
    report.backends = backends()
    for name, entries in psutil.net_if_addrs().items():
        ip = [entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
        report.interfaces[name] = [address for address in ip if not address.startswith("fe80:")] or ip
    report.asked_interfaces = {key: env[key] for key in BACKENDS if env.get(key)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        report.free_bytes = shutil.disk_usage(directory).free
        report.write_mb_per_second = write_speed(directory, report.rank)
    except OSError as error:
        report.directory_problem = error.strerror or str(error)


def _look_at_device(report: Report, device: torch.device) -> None:
    report.devices = [f"cpu, {os.cpu_count() or 1} cores"]
    if device.type != "cuda":
        return
    report.versions["cuda"] = str(torch.version.cuda)
    try:
        report.devices = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        float(torch.ones(1, device=device) + 1)
    except RuntimeError as error:
        report.problems.append(f"{device} does not compute: {str(error).splitlines()[0]}")


def write_speed(directory: Path, rank: int, size: int = DISK_TEST_BYTES) -> float:
    """MB/s of writing a file of `size` bytes, fsync included. Raises OSError."""
    path = directory / f".doctor-{rank}-{os.getpid()}"
    data = os.urandom(1 << 20)
    began = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(size >> 20):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return size / 1e6 / (time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)


def measure(report: Report, group: Group | None, device: torch.device, directory: Path) -> None:
    """Fill in the measurements: clock, shared directory, speeds of matmul, all-reduce and links (collective). Raises TransportError."""
    token = _write_token(report, directory)
    name = broadcast_text(token, group, device)
    _meet(group)
    report.clock_seconds = time.time()
    report.sees_token = not name or bool(report.directory_problem) or (directory / name).exists()
    _meet(group)
    if token:
        (directory / token).unlink(missing_ok=True)
    report.tflops = _matmul_speed(device)
    if group is None:
        return
    numbers = torch.zeros(MESSAGE_NUMBERS, device=device)
    report.all_reduce_mb_per_second = _all_reduce_speed(group, numbers)
    for peer in neighbours(gather_texts(report.node, group, device), group.rank):
        if peer is not None:
            report.links_mb_per_second[str(peer)] = _link_speed(group, peer, numbers)


def _write_token(report: Report, directory: Path) -> str:
    """On rank 0: the name of a new, unique file in checkpoint.dir. Empty on other ranks, and where the file cannot be made."""
    if report.rank != 0 or report.directory_problem:
        return ""
    name = f".doctor-{report.node}-{os.getpid()}-{time.time_ns()}"
    try:
        (directory / name).touch()
    except OSError as error:
        report.directory_problem = error.strerror or str(error)
        return ""
    return name


def neighbours(nodes: Sequence[str], rank: int) -> list[int | None]:
    """The partner that `rank` exchanges messages with, round by round; None: no partner in that round. nodes: node of each rank.

    The nodes form a ring. A rank's partner is the rank at the same place on the next node, then on the node before: each rank measures
    at most two links whatever their number, and all network ports of a node are used at once. An odd ring takes a third round:

        0 - 1   2 - 3   4      then      0   1 - 2   3 - 4      then      4 - 0
    """
    members: dict[str, list[int]] = {}
    for other, node in enumerate(nodes):
        members.setdefault(node, []).append(other)
    ring = list(members)
    mine, place, size = ring.index(nodes[rank]), members[nodes[rank]].index(rank), len(ring)
    links = size if size > 2 else size - 1
    rounds: list[int | None] = [None] * min(links, 2 + size % 2)
    for link in range(links):
        ends = (link, (link + 1) % size)
        if mine in ends:
            partners = members[ring[ends[0] if mine == ends[1] else ends[1]]]
            last_of_odd = size % 2 and link == size - 1
            rounds[2 if last_of_odd else link % 2] = partners[place] if place < len(partners) else None
    return rounds


def _meet(group: Group | None) -> None:
    if group is not None:
        group.barrier()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matmul_speed(device: torch.device, seconds: float = 0.5) -> float:
    """TFLOP/s of a matrix product, the best of those done in `seconds`."""
    size = 4096 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.ones(size, size, dtype=dtype, device=device)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, _seconds(lambda: matmul(a, a), device))
    return 2 * size**3 / best / 1e12


def _all_reduce_speed(group: Group, numbers: torch.Tensor, rounds: int = 5) -> float:
    """MB/s of an all-reduce: bytes of `numbers` over the time of the best round."""
    best = float("inf")
    for _ in range(rounds):
        group.barrier()
        best = min(best, _seconds(lambda: group.all_reduce(numbers), numbers.device))
    return numbers.nbytes / 1e6 / best


def _link_speed(group: Group, peer: int, numbers: torch.Tensor, turns: int = 3) -> float:
    """MB/s of a message to `peer` and back, the best turn after the first, which makes the connection."""

    def there_and_back() -> None:
        calls: list[Callable[[torch.Tensor, int], object]] = [group.send, group.recv]
        for call in calls if group.rank < peer else reversed(calls):
            call(numbers, peer)

    seconds = [_seconds(there_and_back, numbers.device) for _ in range(turns)]
    return 2 * numbers.nbytes / 1e6 / min(seconds[1:])


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of `call`, with its work on the device."""
    began = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - began
