"""The causes, besides code and versions, of how a rank rounds: its processor, the kernels that serve, and variables that libraries read.

Ranks must have the same kernels (`require_same_kernels`), since one that falls back on others trains on without a word. Processors may be
of several kinds; those that are unlike need not give the same bits, and nobody is to blame for that (`kind_of`, `unlike`).
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from megatrain.kernels.dispatch import Kernels, require
from megatrain.runtime.distributed import RemoteError, Session, named
from megatrain.transport.consensus import gather_texts

CPU_INFO = Path("/proc/cpuinfo")
_KEYS = (
    "vendor_id",
    "cpu family",
    "model",
    "model name",
    "CPU implementer",
    "CPU architecture",
    "CPU variant",
    "CPU part",
    "cpu",
    "uarch",
)
"""Lines of CPU_INFO that tell the kind of a processor, on x86, ARM, POWER and RISC-V."""
_FLAGS = ("flags", "Features", "isa")
_CHOOSES = re.compile(r"(s?sse|avx|fma|f16c|amx|asimd|sve|sme(?!p)|bf16|i8mm|rv).*")
"""Instruction sets by which libraries choose among their loops."""
_VARIABLES = re.compile(
    r"(MKL|DNNL|ONEDNN|ATEN|OPENBLAS|BLIS|CUBLAS|CUBLASLT|CUDNN|NUMBA_CPU)_(?!.*VERBOSE)\w+"
    r"|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|TORCH_BLAS_PREFER_\w+|NVIDIA_TF32_OVERRIDE|KMP_DETERMINISTIC_REDUCTION"
)
"""Environment variables that change bits."""


def processor(info: Path = CPU_INFO) -> tuple[str, str]:
    """The kind of the first processor in a file like /proc/cpuinfo, and its instruction sets; without one, what Python knows of it."""
    kind: list[str] = []
    sets: list[str] = []
    with suppress(OSError), info.open(errors="replace") as lines:
        for line in lines:
            key, _, value = (part.strip() for part in line.partition(":"))
            if not key and kind:
                break  # the next one begins
            if key in _KEYS:
                kind.append(value)
            elif key in _FLAGS:
                sets += sorted(flag for flag in value.split() if _CHOOSES.fullmatch(flag))
    return " ".join(kind) or f"{platform.machine()} {platform.processor()}".strip(), " ".join(sets)


def kind_of(device: torch.device, kernels: str, env: Mapping[str, str] = os.environ) -> str:
    """The causes of how this rank rounds, a line each. kernels: those that serve (`require`)."""
    if device.type == "cuda":
        rounds = [f"GPU: {torch.cuda.get_device_name(device)}"]
    else:
        kind, sets = processor()
        tunables = [part for part in env.get("GLIBC_TUNABLES", "").split(":") if part.startswith("glibc.cpu.")]
        rounds = [
            f"CPU: {kind}, used as {torch.backends.cpu.get_cpu_capability()}",
            f"instruction sets: {sets}",
            " ".join(platform.libc_ver()),
            f"threads: {torch.get_num_threads()}",
            *sorted(tunables),
        ]
    variables = sorted(f"{key}={value}" for key, value in env.items() if _VARIABLES.fullmatch(key))
    return "\n".join([*rounds, f"kernels: {kernels}", *variables])


def unlike(kinds: Sequence[str]) -> str:
    """The ranks of another kind than rank 0, and in what the first of them differs, as text; "" if there are none. kinds: of all ranks."""
    others = [rank for rank, kind in enumerate(kinds) if kind != kinds[0]]
    if not others:
        return ""
    first, other = kinds[0].splitlines(), kinds[others[0]].splitlines()
    here, there = (
        "; ".join(line for line in a if line not in b) or "nothing of it" for a, b in ((first, other), (other, first))
    )
    return f"{named(others)} may round otherwise than rank 0 (on rank {others[0]} {there}; on rank 0 {here})"


def require_same_kernels(session: Session, kernels: Kernels, dtype: torch.dtype) -> None:
    """Raise RemoteError on every rank unless the same kernels serve on all (collective); it says why others lack them.

    Raises ValueError, or RemoteError, where those that train.kernels requests cannot be.
    """
    with session.together("looking for kernels"):
        mine = require(kernels, session.device, dtype)
    found = gather_texts(mine, session.everyone, session.device)
    taken = [text.partition(" (")[0] for text in found]  # the reason may have numbers in it that may differ
    if len(set(taken)) == 1:
        return
    ranks = {what: [rank for rank, have in enumerate(taken) if have == what] for what in taken}
    where = "; ".join(f"{found[of[0]]} on {named(of)}" for of in ranks.values())
    raise RemoteError(
        f"The kernels differ between ranks, and so would their rounding: {where}. Make them equal there, or set train.kernels=reference, "
        f"which needs none (it is {kernels})."
    )
