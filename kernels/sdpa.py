"""torch's fused kernels for causal attention, and which of them serves a run: tried on the run's own shape, before its first step.

                dtypes          heads             besides q, k, v as they lie
    cudnn       bf16, fp16      8, 16 .. 128      y and its gradient as they lie; makes a plan for every new length, some 0.1 s each
    flash       bf16, fp16      to 256            the backward copies y and its gradient unless there is one sequence; heads that are no
                                                  multiples of 8 are padded, by copies
    efficient   and fp32        multiples of 8    y lies sequence by sequence: it is copied for the next product, unless there is one

"As they lie": parts of one product's output [s, b, (a + 2 g) d], whatever the strides, if the last is 1; fewer key heads are not repeated.
(torch 2.9 to 2.13: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, attention_backward.cu, flash_api.cpp; native/cudnn/MHA.cpp)

Forward and backward of each are measured once a shape. A kernel that refuses, fails or errs is left out; equals keep the order
above. A choice by time may fall otherwise in the next start, and other kernels round otherwise: a deterministic run takes
the first that serves, of those that give the same bits every time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_efficient_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Fused = Literal["cudnn", "flash", "efficient"]

BACKENDS: dict[Fused, tuple[SDPBackend, Callable[..., bool]]] = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION, can_use_cudnn_attention),
    "flash": (SDPBackend.FLASH_ATTENTION, can_use_flash_attention),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, can_use_efficient_attention),
}
"""Kernels in order of preference: the first of equally fast ones is used."""
STEADY: tuple[Fused, ...] = ("flash", "efficient")
"""Kernels for shapes that were not measured: no plan is built for each length, and torch's deterministic mode gives the same bits."""
EQUAL = 1.05
"""Times within this factor of each other count as equal, so that another start makes the same choice."""
CALLS, ROUNDS = 5, 3
"""A kernel's time is the least over ROUNDS of the mean over CALLS calls."""
CHECKED = 128
"""Number of last tokens of a sequence whose outputs and gradients are compared with the float32 definition."""
WRONG = 0.03
"""Largest relative error (root mean square of the difference over that of the definition) of a kernel; BF16 rounds by 0.004 at most."""


@dataclass(frozen=True)
class Shape:
    """Dims of q [s, b, heads, d], and of k and v [s, b, groups, d], all views of one projection's output."""

    s: int
    b: int
    heads: int
    groups: int
    d: int


@dataclass(frozen=True)
class Choice:
    """The kernels chosen for causal attention."""

    order: tuple[Fused, ...] = STEADY
    """Kernels in order of preference: the first that supports a call runs it; empty if none supports the shape."""
    note: str = ""
    """Line on the choice and its reasons, printed as a run starts."""


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: tuple[Fused, ...] = STEADY) -> torch.Tensor:
    """Causal softmax(q k^T / sqrt(d)) v by torch: q [s, b, a, d], k and v [n, b, g, d] -> [s, b, a d].

    The queries are the last s of the n tokens. Where s < n, a cache grows by the token, and kernels that want plans are not asked.
    """
    if q.device.type != "cuda":
        return _call(q, k, v)
    if len(q) != len(k):
        order = STEADY
    with sdpa_kernel([*(BACKENDS[name][0] for name in order), SDPBackend.MATH], set_priority=True):
        return _call(q, k, v)


def _call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`fused` by the kernel that torch selects, on views [b, heads, s, d]."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    queries, keys = q.shape[2], k.shape[2]
    mask = None
    if 1 < queries < keys:  # a prompt continued from a cache: the triangle is not square
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    y = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=queries == keys, enable_gqa=q.shape[1] != k.shape[1])
    return y.permute(2, 0, 1, 3).flatten(2)


@dataclass(frozen=True)
class Case:
    """Inputs and output gradient on which a kernel is measured and checked."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dy: torch.Tensor

    @staticmethod
    def of(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
        """Normally distributed tensors, from a generator with seed 0."""
        generator, width = torch.Generator(device).manual_seed(0), shape.heads * shape.d

        def some(columns: int) -> torch.Tensor:
            return torch.empty(shape.s, shape.b, columns, dtype=dtype, device=device).normal_(generator=generator)

        parts = some(width + 2 * shape.groups * shape.d).split((width, shape.groups * shape.d, shape.groups * shape.d), -1)
        q, k, v = (x.unflatten(-1, (-1, shape.d)).requires_grad_() for x in parts)
        return Case(q, k, v, some(width))

    def results(self) -> list[torch.Tensor]:
        """y, dq, dk and dv from the kernel that torch selects."""
        y = _call(self.q, self.k, self.v)
        return [y.detach().view_as(self.q), *torch.autograd.grad(y, (self.q, self.k, self.v), self.dy)]

    def deviation(self, results: list[torch.Tensor]) -> float:
        """Largest relative error of results against the definition in float32, for the last sequence's last tokens and key head.

        Gradients of the last keys come from the last queries alone, so the other scores need not be computed.
        """
        s, last, repeat = len(self.q), min(CHECKED, len(self.q)), self.q.shape[2] // self.k.shape[2]
        k, v = (x.detach()[:, -1, -1].float().requires_grad_() for x in (self.k, self.v))
        q = self.q.detach()[-last:, -1, -repeat:].float().requires_grad_()
        with torch.enable_grad():
            scores = torch.einsum("iad,jd->aij", q, k) / math.sqrt(q.shape[-1])
            hidden = torch.ones(last, s, dtype=torch.bool, device=q.device).triu(s - last + 1)
            y = torch.einsum("aij,jd->iad", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        dy = self.dy.view_as(self.q)[-last:, -1, -repeat:].float()
        exact = [y.detach(), *(x[-last:] for x in torch.autograd.grad(y, (q, k, v), dy))]
        mine = [
            x[-last:, -1, -repeat:] if number < 2 else x[-last:, -1, -1] for number, x in enumerate(results)
        ]  # y and dq have all heads
        deviations = [
            (x.float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt().clamp_min(1e-30)
            for x, wanted in zip(mine, exact, strict=True)
        ]
        return float(torch.stack(deviations).max())  # NaN if any is NaN, which Python's max may ignore


Trial = Callable[[Fused, Case, bool], float]
"""(kernel, inputs, whether to time it) -> milliseconds of forward and backward, 0 if not timed. Raises RuntimeError with the reason if
the kernel refuses the shape or errs."""


def tried(name: Fused, case: Case, timed: bool) -> float:
    """`Trial` on a GPU: check one of torch's kernels and time it."""
    backend, takes = BACKENDS[name]
    with sdpa_kernel(backend), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        q, k, v = (x.permute(1, 2, 0, 3) for x in (case.q, case.k, case.v))
        if not takes(SDPAParams(q, k, v, None, 0.0, True, q.shape[1] != k.shape[1]), True):
            raise RuntimeError(str(said[0].message).split(" (Triggered")[0] if said else "it refuses the shape")
        deviation = case.deviation(case.results())
        if not deviation <= WRONG:  # also if it is NaN
            raise RuntimeError(f"its results are wrong by {deviation:.2g} of their size")
        return min(_milliseconds(case.results) for _ in range(ROUNDS)) if timed else 0.0


def _milliseconds(call: Callable[[], Any]) -> float:
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    for _ in range(CALLS):
        call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / CALLS


@cache
def choose(shape: Shape, dtype: torch.dtype, device: torch.device, deterministic: bool) -> Choice:
    """The kernels for a shape on a device. On a GPU they are measured, once a process, which takes a second or two.

    Call it while little of the device's memory is in use: it resets the statistics of peak memory.
    """
    if device.type != "cuda":
        return Choice()
    with torch.cuda.device(device), torch.enable_grad():
        try:
            return choose_by(tried, shape, dtype, device, deterministic)
        finally:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def choose_by(trial: Trial, shape: Shape, dtype: torch.dtype, device: torch.device, deterministic: bool) -> Choice:
    """The kernels for a shape, as `trial` measures them; `choose` passes `tried`."""
    where = f"at {[shape.b, shape.heads, shape.s, shape.d]}"
    try:
        case = Case.of(shape, dtype, device)
    except torch.OutOfMemoryError:
        return Choice(note=f"attention: {' or '.join(STEADY)}, untried, since the device has no room for q, k and v {where}")
    times: dict[Fused, float] = {}
    refusals: dict[Fused, str] = {}
    for name in STEADY if deterministic else BACKENDS:
        try:
            times[name] = trial(name, case, not deterministic)
        except RuntimeError as error:
            refusals[name] = str(error).strip().split("\n")[0]
    why = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    if not times:
        return Choice((), f"attention: in blocks of queries {where}, as no fused kernel serves ({why})")
    left_out = f" | left out: {why}" if why else ""
    if deterministic:
        served = tuple(times)
        return Choice(
            served, f"attention: {served[0]}, the first that serves in the order of a deterministic run {where}{left_out}"
        )
    least = min(times.values())
    first = next(name for name, time in times.items() if time <= EQUAL * least)
    rest = sorted((name for name in times if name != first), key=times.__getitem__)
    slower = ", ".join(f"{name} {times[name] / times[first]:.1f}x as long" for name in rest)
    return Choice((first, *rest), f"attention: {first}{f' ({slower})' if slower else ''} {where}{left_out}")
