"""Matrix products on the fastest library at hand, with torch's own as the reference.

torch multiplies float32 matrices on CPU with MKL, which on processors of other makers than Intel runs at less than half of what
oneDNN reaches there (AMD EPYC, AVX-512, one thread, [2048, 512] x [512, 2048]: 100 against 225 GFLOP/s). torch ships oneDNN
too, and uses it for BF16 alone, where it first copies a bias into every row of the output: called by its own name, oneDNN adds the
bias as it goes. The choice is a rule, not a measurement, so that a run gives the same bits every time.

A weight gradient is a product of 16-bit matrices that joins a float32 sum. On a GPU the matmul itself adds it where torch can
(`torch.addmm` with `out_dtype`): the sum is read and written once, 8 bytes an element, and nothing is rounded to 16 bits. Else the
product is written, read and added: 12 bytes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

WIDENED = 1 << 18
"""Number of elements of a product added to a wider tensor at a time, on CPU."""

STEADY = 4
"""The rows of a product on CPU whose bits may not depend on their number are a multiple."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in], weight [out, in], bias [out] or None -> x weight^T + bias [..., out]. Not differentiable where oneDNN serves."""
    if _onednn_serves(x, weight) or (bias is not None and _onednn_adds_bias(x, weight)):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [m, k], b [k, n], of any strides -> [m, n]. Not differentiable where oneDNN serves."""
    if _onednn_serves(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return a @ b


def add_matmul(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool = False) -> None:
    """out [m, n] += a [m, k] b [k, n], in place; `out` may be wider than a and b (float32 sums of BF16 products).

    first: overwrite `out` instead of adding to it.
    """
    keep = 0 if first else 1
    if out.dtype == a.dtype and not _onednn_serves(a, b):
        out.addmm_(a, b, beta=keep)
    elif out.dtype == torch.float32 and adds_inside(out.device, a.dtype) and a.numel() > 0:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=keep, out=out)
    elif first:
        out.copy_(matmul(a, b))
    elif out.dtype == a.dtype or out.device.type != "cpu":
        out.add_(matmul(a, b))
    else:  # torch on CPU makes a float32 copy first; that of a block stays in the cache
        rows = max(1, WIDENED // max(1, out.shape[1]))
        for part, more in zip(out.split(rows), matmul(a, b).split(rows), strict=True):
            part.add_(more)


def steady_rows(rows: int, device: torch.device, dtype: torch.dtype) -> int:
    """The number of rows, at least `rows`, at which a row of a product has the same bits whatever the number of rows beside it.

    On a CPU libraries multiply a few rows in other orders: oneDNN a single one, MKL the rows left over of groups of four, in each
    thread's share. A multiple of `STEADY` has none left over. No more rows are needed on a GPU, where nothing is promised.
    """
    return rows if device.type != "cpu" or dtype.itemsize < 4 else -(-rows // STEADY) * STEADY


@cache
def adds_inside(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a matmul of this dtype can add to a float32 sum itself; tried once a process, which waits for the GPU."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    ones, total = torch.ones(16, 16, dtype=dtype, device=device), torch.full((16, 16), 2.0**-10, device=device)
    try:
        torch.addmm(total, ones.t(), ones, out_dtype=torch.float32, out=total)
    except (
        TypeError,
        RuntimeError,
    ):  # torch 2.7 does not know the argument, and later ones not on every device or for every sum
        return False
    return bool((total == 16 + 2.0**-10).all())  # a sum in 16 bits would lose the second product


def _onednn_serves(a: torch.Tensor, b: torch.Tensor) -> bool:
    in_fp32 = a.dtype == b.dtype == torch.float32 and a.device.type == "cpu"
    return in_fp32 and _prefer_onednn() and a.numel() > 0 and b.numel() > 0


def _onednn_adds_bias(x: torch.Tensor, weight: torch.Tensor) -> bool:
    in_bf16 = x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu"
    return in_bf16 and x.numel() > 0 and weight.numel() > 0 and _onednn_has_bf16()


@cache
def _onednn_has_bf16() -> bool:
    supported: bool = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


@cache
def _prefer_onednn() -> bool:
    """Whether MKL is slow on this CPU: x86 with AVX-512, not from Intel."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
