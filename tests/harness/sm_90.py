"""Compiles the Triton kernels for sm_90 as their own callers call them, without a GPU: a line of JSON for each.

    python tests/harness/sm_90.py PATTERN...     (TRITON_INTERPRET must not be set)

The callers run on CPU tensors; in the place of each launch the kernel is compiled for those very arguments (their dtypes, their
divisibility by 16, their strides of 1), and what ptxas made of it is read from the binary: registers, bytes that were spilled, and the
accesses to global memory of 2 bytes each, of which a kernel for 16-bit numbers that lie behind one another has none.
"""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megatrain.kernels import dispatch

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
ROWS = 48
MANY = 4096
"""Rows of which a program of an activation takes several."""


class Hopper:
    """The driver of a GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_interface(self) -> Any:
        return torch.cpu


COMPILED: list[Any] = []


def compile_instead(self: JITFunction, grid: Any) -> Callable[..., None]:
    """What `kernel[grid]` gives here."""

    def launch(*args: Any, **kwargs: Any) -> None:
        COMPILED.append((self.__name__, self.run(*args, grid=grid, warmup=True, **kwargs)))

    return launch


def measured(kernel: Any) -> dict[str, int]:
    """Registers, spilled bytes, and accesses to global memory of 2 bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    widths = [
        (int(vector or 1)) * int(bits) // 8
        for vector, bits in re.findall(r"(?:ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)", kernel.asm["ptx"])
    ]
    return {
        "registers": found["REG"],
        "spilled": found["STACK"] + found["LOCAL"],
        "half_words": widths.count(2),
        "shared": kernel.metadata.shared,
    }


Call = tuple[str, Callable[[], object]]


def calls() -> Iterator[Call]:
    """Every kernel's callers with the shapes of real models, views and odd sizes: (name, call)."""
    yield from updates()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for of_kind in (norms, activations, rotations, heads_apart, attentions, pages, dropouts, entropies):
            yield from of_kind(dtype, str(dtype).removeprefix("torch."))


def some(*shape: int, dtype: torch.dtype, grad: bool = True) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype).requires_grad_(grad)


def differentiate(*outputs: torch.Tensor) -> None:
    torch.autograd.backward([y for y in outputs if y.requires_grad], [torch.ones_like(y) for y in outputs if y.requires_grad])


def updates() -> Iterator[Call]:
    from megatrain.kernels.adamw import adam_triton
    from megatrain.kernels.update import Update

    def updated(n: int, dtype: torch.dtype, halves: bool, decoupled: bool) -> None:
        one = torch.ones(())
        rates = Update(1e-3, (0.9, 0.95), 1e-8, 0.0, one, one, one)
        apart, low = dtype != torch.float32 and not halves, torch.zeros(n, dtype=torch.int16) if halves else None
        masters, grads, *states = (torch.zeros(n) for _ in range(4))
        adam_triton(
            rates, 0.1, torch.zeros(n, dtype=dtype), masters if apart else None, low, grads, *states, decoupled=decoupled
        )

    for n in (1 << 20, 1001):
        for decoupled in (True, False):
            name = f"adam n={n} decoupled={decoupled:d}"
            yield f"{name} halves", lambda n=n, d=decoupled: updated(n, torch.bfloat16, True, d)
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                short = str(dtype).removeprefix("torch.")
                yield f"{name} {short}", lambda n=n, y=dtype, d=decoupled: updated(n, y, False, d)


def norms(dtype: torch.dtype, short: str) -> Iterator[Call]:
    from megatrain.kernels.norm import add_biased_norm, add_norm, norm

    def normed(n: int, rms: bool, add: bool, before: bool) -> None:
        x, weight = some(ROWS, n, dtype=dtype), some(n, dtype=dtype)
        bias = None if rms else some(n, dtype=dtype)
        if before:
            place = some(n, dtype=torch.float32)
            differentiate(*add_biased_norm(x, some(ROWS, n, dtype=dtype), weight, bias, place, 1e-5, rms=rms, kernels="triton"))
        elif add:
            differentiate(*add_norm(x, some(ROWS, n, dtype=dtype), weight, bias, 1e-5, rms=rms, kernels="triton"))
        else:
            differentiate(norm(x, weight, bias, 1e-5, rms=rms, kernels="triton"))

    for n in (768, 1000, 1600, 2048, 4096, 5120, 8192, 12288):
        for rms in (True, False):
            for add, before in ((False, False), (True, False), (True, True)):
                name = f"norm n={n} rms={rms:d} add={add:d} before={before:d} {short}"
                yield name, lambda n=n, rms=rms, a=add, b=before: normed(n, rms, a, b)


def activations(dtype: torch.dtype, short: str) -> Iterator[Call]:
    from megatrain.kernels.gated import activated, gated

    def gate(kind: str, columns: int, whole: int, biased: bool) -> None:
        both, bias = some(MANY, whole, dtype=dtype), some(2 * columns, dtype=torch.float32) if biased else None
        differentiate(gated(both[:, :columns], both[:, whole - columns :], kind, bias=bias, kernels="triton"))

    def act(kind: str, columns: int, biased: bool) -> None:
        bias = some(columns, dtype=torch.float32) if biased else None
        differentiate(activated(some(MANY, columns, dtype=dtype), kind, bias=bias, kernels="triton"))

    for columns, whole in ((11008, 22016), (4096, 8192), (1001, 2002), (8, 24)):
        for kind, biased in (("swiglu", False), ("geglu", False), ("geglu", True)):
            name = f"gate {kind} {columns} of {whole} bias={biased:d} {short}"
            yield name, lambda k=kind, c=columns, w=whole, b=biased: gate(k, c, w, b)
    for columns in (3072, 8192, 1001):
        for kind in ("gelu", "gelu_tanh", "relu"):
            for biased in (False, True):
                yield f"act {kind} {columns} bias={biased:d} {short}", lambda k=kind, c=columns, b=biased: act(k, c, b)


def rotations(dtype: torch.dtype, short: str) -> Iterator[Call]:
    from megatrain.kernels.rotary import rotary

    def rotated(heads: int, d: int, turned: int, interleaved: bool, fused: int) -> None:
        x = some(ROWS, 1, heads * d * fused, dtype=dtype)[..., : heads * d].view(ROWS, 1, heads, d)
        table = some(ROWS, 1, turned // 2, dtype=dtype, grad=False)
        differentiate(rotary(x, table, table, interleaved=interleaved, kernels="triton"))

    heads_of = (32, 128, 128, 1), (8, 128, 128, 3), (12, 64, 64, 3), (25, 64, 64, 1), (12, 64, 32, 1), (1, 21, 16, 1)
    for number, d, turned, fused in heads_of:
        for interleaved in (False, True):
            name = f"rotary {number}x{d} of {turned} interleaved={interleaved:d} x{fused} {short}"
            yield name, lambda h=number, d=d, t=turned, i=interleaved, f=fused: rotated(h, d, t, i, f)


def heads_apart(dtype: torch.dtype, short: str) -> Iterator[Call]:
    from megatrain.kernels.rotary import Turns, heads

    def apart(d: int, turned: int, groups: int, interleaved: bool, biased: bool) -> None:
        whole, table = some(MANY // 4, 4, 6 * groups * d, dtype=dtype), some(99, turned // 2, dtype=dtype, grad=False)
        turns = Turns(table, table, (torch.zeros(MANY // 4, 4, dtype=torch.long),), interleaved) if turned else None
        parts = whole.split([4 * groups * d, groups * d, groups * d], -1)
        bias = some(6 * groups * d, dtype=torch.float32) if biased else None
        differentiate(*heads(*parts, d, turns, bias=bias, kernels="triton"))

    for head, turned, groups in ((64, 0, 12), (128, 128, 8), (64, 32, 1), (21, 16, 1), (80, 40, 2)):
        for biased, interleaved in ((False, False), (True, False), (True, True)):
            name = f"heads {head} of {turned} groups={groups} interleaved={interleaved:d} bias={biased:d} {short}"
            yield name, lambda h=head, t=turned, g=groups, i=interleaved, b=biased: apart(h, t, g, i, b)


def attentions(dtype: torch.dtype, short: str) -> Iterator[Call]:
    from megatrain.kernels.attention_dropout import Words, drop_weights, tiled
    from megatrain.kernels.attention_mask import AttentionMask

    words = Words((-5, 16), (1, 2), -3, 1.25, torch.zeros(2, dtype=torch.int64), 1)
    documents = torch.zeros(ROWS, 2, dtype=torch.int64)
    masks = {
        "": AttentionMask(),
        " prefix": AttentionMask(prefix=torch.zeros(2, dtype=torch.int64)),
        " all masks": AttentionMask(window=5, documents=documents, prefix=documents),
    }

    def attended(heads: int, groups: int, d: int, mask: str) -> None:
        parts = some(ROWS, 2, (heads + 2 * groups) * d, dtype=dtype).split((heads * d, groups * d, groups * d), -1)
        differentiate(tiled(*(x.unflatten(-1, (-1, d)) for x in parts), words, masks[mask]))

    def weighed(columns: int) -> None:
        drop_weights(some(4, 6, columns, dtype=dtype, grad=False), words, 0, 2, 3, 1, [slice(0, columns)])

    for columns in (1024, 101):
        yield f"weights n={columns} {short}", lambda c=columns: weighed(c)
    for number, groups, d in ((12, 12, 64), (32, 8, 128), (4, 4, 80), (3, 1, 21)) if dtype != torch.float32 else ():
        for mask in masks:
            name = f"attention {number} of {groups} x {d}{mask} {short}"
            yield name, lambda a=number, g=groups, n=d, m=mask: attended(a, g, n, m)


def pages(dtype: torch.dtype, short: str) -> Iterator[Call]:
    from megatrain.kernels.paged_attention import Pages, paged_attention

    prefix = torch.ones(2, dtype=torch.int32)

    def attended(heads: int, groups: int, d: int, counts: tuple[int, ...] | None, masked: bool) -> None:
        tokens = 2 if counts is None else sum(counts)
        keys, values = (some(1024, groups, d, dtype=dtype, grad=False) for _ in range(2))
        q = some(tokens, (heads + 2 * groups) * d, dtype=dtype, grad=False)[:, : heads * d].view(tokens, heads, d)
        of = Pages(torch.zeros(2, 64, dtype=torch.int32), prefix, 16, counts, prefix if masked and counts else None)
        more = {"window": 9, "sparse": (16, 2, 1), "slopes": torch.zeros(heads)} if masked else {}
        paged_attention(q, keys, values, of, **more, kernels="triton")

    large = [(48, 1, 128), (16, 4, 256), (6, 2, 80)] if dtype != torch.float32 else []
    for number, groups, d in ((16, 8, 128), (32, 4, 64), (12, 12, 64), *large):
        for counts in (None, (70, 3)):
            for masked in (False, True):
                name = f"pages {number} of {groups} x {d} queries={'one' if counts is None else 'several'} masked={masked:d} {short}"
                yield name, lambda a=number, g=groups, n=d, c=counts, m=masked: attended(a, g, n, c, m)


def dropouts(dtype: torch.dtype, short: str) -> Iterator[Call]:
    from megatrain.kernels.dropout import dropout_triton

    def dropped(h: int) -> None:
        x, samples = some(ROWS // 3, 3, h, dtype=dtype, grad=False), torch.zeros(3, dtype=torch.int64)
        dropout_triton(x, samples, 1, (-5, 16), (1, 2), -3, 1.25)

    for h in (768, 1600, 4096, 101):
        yield f"dropout h={h} {short}", lambda h=h: dropped(h)


def entropies(dtype: torch.dtype, short: str) -> Iterator[Call]:
    from megatrain.kernels.cross_entropy import gradient_of, statistics_of

    def entropy(columns: int, ids: int, more: bool) -> None:
        logits = some(ROWS, columns, dtype=dtype, grad=False)
        local, here = torch.zeros(ROWS, dtype=torch.int64), torch.ones(ROWS, dtype=torch.bool)
        top, total, label, _ = statistics_of(logits, local, here, ids=ids, with_sum=more, kernels="triton")
        gradient_of(logits, top, total, total if more else None, local, here, label, ids=ids, kernels="triton")

    for columns, ids in ((50304, 50257), (50304, 50304), (128256, 128256), (16384, 16384), (101, 101)):
        for more in (False, True):
            yield f"entropy v={ids} of {columns} more={more:d} {short}", lambda c=columns, v=ids, m=more: entropy(c, v, m)


def main(patterns: list[str]) -> None:
    """Compile the calls whose names match a pattern."""
    driver.set_active(Hopper())
    dispatch.INTERPRETED = True  # the callers take CPU tensors
    JITFunction.__getitem__ = compile_instead  # type: ignore[method-assign]
    for name, call in calls():
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            continue
        began = time.perf_counter()
        COMPILED.clear()
        call()
        seconds = round((time.perf_counter() - began) / max(1, len(COMPILED)), 2)
        for kernel, compiled in COMPILED:
            sys.stdout.write(json.dumps({"call": name, "kernel": kernel, "seconds": seconds, **measured(compiled)}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:] or ["*"])
