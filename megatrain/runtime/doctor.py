"""What a machine can do for a job, rank by rank, and what of it would make the job fail: `megatrain doctor`.

Each rank looks at its own machine (`look`) before anything is joined, then measures itself among the others (`measure`). The reports of all
ranks are judged in one place (`judge`), without any machine: every fault has its rule there.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from megatrain.kernels.dispatch import triton
from megatrain.kernels.matmul import matmul
from megatrain.parallel.transport import Group
from megatrain.parallel.transport_torch import backends

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "pyyaml", "megatrain")
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
DISK_TEST_BYTES = 64 << 20
SLOW = 0.75
"""A rank that reaches less of the median is named."""
SKEWED_SECONDS = 2.0
"""Clocks that are further apart make logs and timeouts hard to read."""


@dataclass
class Report:
    """What one rank found."""

    rank: int
    node: str
    versions: dict[str, str] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    kernels: str = ""
    """Whether Triton's kernels would serve, and why not."""
    backends: list[str] = field(default_factory=list)
    interfaces: list[str] = field(default_factory=list)
    asked_interfaces: dict[str, str] = field(default_factory=dict)
    """Variable -> what it names."""
    free_bytes: int = 0
    write_mb_per_second: float = 0.0
    directory_problem: str = ""
    """Why checkpoint.dir cannot be written."""
    sees_token: bool = True
    """Whether a file that rank 0 wrote in checkpoint.dir is there."""
    clock_seconds: float = 0.0
    """This machine's time when all ranks had just met."""
    tflops: float = 0.0
    all_reduce_mb_per_second: float = 0.0

    @property
    def name(self) -> str:
        """Of the rank, for people."""
        return f"rank {self.rank} on {self.node}"


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    level: Literal["fail", "warn"]
    """fail: a job would not run, or would lose its work."""
    message: str


def look(rank: int, device: torch.device, directory: Path, env: Mapping[str, str]) -> Report:
    """What this machine has; joins nothing."""
    report = Report(rank, socket.gethostname())
    report.versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            report.versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            report.versions[package] = "not installed"
    if torch.version.cuda and device.type == "cuda":
        report.versions["cuda"] = torch.version.cuda
        report.devices = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    else:
        report.devices = [f"cpu, {os.cpu_count() or 1} cores"]
    report.kernels = (
        "triton"
        if triton is not None and device.type == "cuda"
        else "plain PyTorch: "
        + ("Triton is not installed (pip install 'megatrain[gpu]')" if triton is None else f"Triton has no {device.type}")
    )
    report.backends = backends()
    report.interfaces = [name for _, name in socket.if_nameindex()]
    report.asked_interfaces = {key: env[key] for key in INTERFACE_VARIABLES if env.get(key)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        report.free_bytes = shutil.disk_usage(directory).free
        report.write_mb_per_second = write_speed(directory, rank)
    except OSError as error:
        report.directory_problem = error.strerror or str(error)
    return report


def write_speed(directory: Path, rank: int, size: int = DISK_TEST_BYTES) -> float:
    """MB/s of a file that is on the disk when its time is taken. Raises OSError."""
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
    """Add what a rank is among the others (collective)."""
    token = directory / ".doctor-shared"
    if report.rank == 0 and not report.directory_problem:
        token.write_text(str(os.getpid()))
    _meet(group)
    report.clock_seconds = time.time()
    report.sees_token = token.exists() or bool(report.directory_problem)
    _meet(group)
    if report.rank == 0 and not report.directory_problem:
        token.unlink(missing_ok=True)
    report.tflops = _matmul_speed(device)
    if group is not None:
        report.all_reduce_mb_per_second = _all_reduce_speed(group, device)


def _meet(group: Group | None) -> None:
    if group is not None:
        group.barrier()


def _matmul_speed(device: torch.device, seconds: float = 0.5) -> float:
    """TFLOP/s of one matrix product, the best of several."""
    size = 4096 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.ones(size, size, dtype=dtype, device=device)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        matmul(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e12


def _all_reduce_speed(group: Group, device: torch.device, size: int = 4 << 20, rounds: int = 5) -> float:
    """MB/s of the numbers of an all-reduce of float32, the best round."""
    numbers = torch.zeros(size, device=device)
    best = float("inf")
    for _ in range(rounds):
        group.barrier()
        began = time.perf_counter()
        group.all_reduce(numbers)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return size * 4 / 1e6 / best


# --- judgement ------------------------------------------------------------------------------------------------------------


def judge_alone(report: Report) -> list[Finding]:
    """What makes a rank fail before it meets any other."""
    return [
        Finding(
            "fail",
            f"{report.name}: {key}={value} is no interface here; there are {', '.join(report.interfaces)}. Set {key} to one of them.",
        )
        for key, value in report.asked_interfaces.items()
        if not any(_names(part, report.interfaces) for part in value.split(","))
    ]


def _names(asked: str, interfaces: Sequence[str]) -> bool:
    """Whether a part of an interface variable names one of them; NCCL takes prefixes, = for exact names and ^ for what to avoid."""
    if asked.startswith("^"):
        return True
    return any(name == asked.removeprefix("=") or (not asked.startswith("=") and name.startswith(asked)) for name in interfaces)


def judge(reports: Sequence[Report], checkpoint_bytes: int, kept: int) -> list[Finding]:
    """What is not as it should be, worst first. checkpoint_bytes: of a whole checkpoint; kept: how many stay."""
    found = [finding for report in reports for finding in judge_alone(report)]
    for rule in (_versions, _devices, _directories, _clocks, _speeds):
        found += rule(reports)
    found += _space(reports, checkpoint_bytes, kept)
    return sorted(found, key=lambda finding: finding.level)


def _versions(reports: Sequence[Report]) -> list[Finding]:
    found = []
    for package in reports[0].versions:
        usual = Counter(report.versions.get(package, "not installed") for report in reports).most_common(1)[0][0]
        others = [report for report in reports if report.versions.get(package) != usual]
        if others:
            theirs = ", ".join(sorted({f"{r.name} has {r.versions.get(package, 'none')}" for r in others}))
            found.append(
                Finding("fail", f"{package} is not the same everywhere: {theirs}, the others {usual}. Install one version.")
            )
        elif usual == "not installed":
            found.append(Finding("fail", f"{package} is not installed: pip install -c launch/constraints.txt -e ."))
    return found


def _devices(reports: Sequence[Report]) -> list[Finding]:
    usual = Counter(tuple(report.devices) for report in reports).most_common(1)[0][0]
    return [
        Finding("warn", f"{report.name} has {', '.join(report.devices) or 'no device'}, the others {', '.join(usual)}.")
        for report in reports
        if tuple(report.devices) != usual
    ]


def _directories(reports: Sequence[Report]) -> list[Finding]:
    found = [
        Finding(
            "fail",
            f"{report.name} cannot write checkpoint.dir: {report.directory_problem}. Set checkpoint.dir to a directory it can.",
        )
        for report in reports
        if report.directory_problem
    ]
    blind = sorted({report.node for report in reports if not report.sees_token})
    if blind:
        found.append(
            Finding(
                "fail",
                f"checkpoint.dir is not the same directory everywhere: {', '.join(blind)} does not see what rank 0 on "
                f"{reports[0].node} wrote there. Set checkpoint.dir to one on a shared file system.",
            )
        )
    return found


def _clocks(reports: Sequence[Report]) -> list[Finding]:
    middle = statistics.median(report.clock_seconds for report in reports)
    return [
        Finding(
            "warn", f"the clock of {report.name} is {report.clock_seconds - middle:+.1f} s from the others'. Start NTP there."
        )
        for report in reports
        if abs(report.clock_seconds - middle) > SKEWED_SECONDS
    ]


def _speeds(reports: Sequence[Report]) -> list[Finding]:
    found = []
    measures: dict[str, tuple[Callable[[Report], float], str]] = {
        "matrix products": (lambda report: report.tflops, "TFLOP/s"),
        "the disk of checkpoint.dir": (lambda report: report.write_mb_per_second, "MB/s"),
    }
    for what, (value, unit) in measures.items():
        middle = statistics.median(value(report) for report in reports)
        found += [
            Finding(
                "warn",
                f"{report.name} is slow: {what} {value(report):.3g} {unit}, the median is {middle:.3g}. All will wait for it.",
            )
            for report in reports
            if value(report) < SLOW * middle and not report.directory_problem
        ]
    return found


def _space(reports: Sequence[Report], checkpoint_bytes: int, kept: int) -> list[Finding]:
    first = next((report for report in reports if not report.directory_problem), None)
    if first is None or not checkpoint_bytes:
        return []
    free, each = first.free_bytes / 1e9, checkpoint_bytes / 1e9
    if first.free_bytes < 2 * checkpoint_bytes:  # the one that is and the one that is being written
        return [
            Finding(
                "fail",
                f"checkpoint.dir on {first.node} has {free:.1f} GB free, and two checkpoints take {2 * each:.1f} GB. Free some, or set "
                "checkpoint.dir to a larger disk.",
            )
        ]
    if kept and first.free_bytes < (kept + 1) * checkpoint_bytes:
        return [
            Finding(
                "warn",
                f"checkpoint.dir on {first.node} has {free:.1f} GB free, and checkpoint.keep={kept} with one being written takes "
                f"{(kept + 1) * each:.1f} GB. Set checkpoint.keep={max(1, int(first.free_bytes / checkpoint_bytes) - 1)}.",
            )
        ]
    return []


def as_json(reports: Sequence[Report], findings: Sequence[Finding]) -> dict[str, Any]:
    """Everything, for programs."""
    ok = not any(finding.level == "fail" for finding in findings)
    return {"ok": ok, "findings": [asdict(f) for f in findings], "ranks": [asdict(report) for report in reports]}
