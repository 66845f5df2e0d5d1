"""Each kernel, forward and backward, beside its reference, torch.compile of the reference, and the time that its bytes take to copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_speeds import copy_speed, seconds_of, tried
from isolated import Note
from torch.nn.functional import cross_entropy, dropout, scaled_dot_product_attention

from megatrain.kernels import compiled
from megatrain.kernels.adamw import adam_reference, adam_triton
from megatrain.kernels.attention import Variant, attention
from megatrain.kernels.cross_entropy import gradient_of, statistics_of
from megatrain.kernels.dispatch import Kernels, use_triton
from megatrain.kernels.gated import gated
from megatrain.kernels.norm import add_norm, norm
from megatrain.kernels.rotary import rotary
from megatrain.kernels.update import Update
from megatrain.parallel import rng


@dataclass(frozen=True)
class Case:
    """One kernel at one shape."""

    call: Callable[[Kernels], object]
    """Forward and backward, or an update."""
    compiled: Callable[[], object]
    """The same by torch.compile."""
    moved: int
    """Bytes that must be read and written."""


def cases(device: torch.device, tokens: int, h: int, vocab: int) -> dict[str, Callable[[], Case]]:
    """What makes each case, one after the other, so that one alone is in memory."""
    bf16 = {"dtype": torch.bfloat16, "device": device}
    row = 2 * tokens * h
    stretch = compiled.compiled

    def back(results: Any, *inputs: torch.Tensor) -> None:
        results = [results] if isinstance(results, torch.Tensor) else list(results)
        torch.autograd.grad(results, inputs, [torch.empty_like(y) for y in results])

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, **bf16).requires_grad_()

    def norms(rms: bool, added: bool) -> Case:
        x, residual, weight = leaf(tokens, 1, h), leaf(tokens, 1, h), leaf(h)
        bias = None if rms else leaf(h)
        ends = [weight] if rms else [weight, bias]
        given = {"eps": 1e-5, "rms": rms}
        if added:
            graph = stretch(compiled.add_norm, "checks", **given)
            return Case(
                lambda k: back(add_norm(x, residual, weight, bias, kernels=k, **given), x, residual, *ends),
                lambda: back(graph(x, residual, weight, bias), x, residual, *ends),
                8 * row,
            )
        graph = stretch(compiled.norm, "checks", **given)
        return Case(
            lambda k: back(norm(x, weight, bias, kernels=k, **given), x, *ends),
            lambda: back(graph(x, weight, bias), x, *ends),
            5 * row,
        )

    def turned(interleaved: bool) -> Case:
        d = min(h, 128)
        x, angles = leaf(tokens, 1, h // d, d), torch.randn(tokens, 1, d // 2, device=device)
        cos, sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
        graph = stretch(compiled.rotary, "checks", interleaved=interleaved)
        return Case(
            lambda k: back(rotary(x, cos, sin, interleaved=interleaved, kernels=k), x),
            lambda: back(graph(x, cos, sin), x),
            4 * row,
        )

    def gates(kind: str) -> Case:
        both = leaf(tokens, 1, 2 * h)
        graph = stretch(compiled.activation, "checks", kind=kind)
        return Case(
            lambda k: back(gated(*both.chunk(2, -1), kind, kernels=k), both),
            lambda: back(graph(*both.chunk(2, -1)), both),
            8 * row,
        )

    def dropped() -> Case:
        x, key, samples = leaf(tokens // 4, 4, h), rng.key(1), torch.arange(4, device=device)
        graph = torch.compile(lambda x: dropout(x, 0.1), fullgraph=True, dynamic=False)
        return Case(lambda k: back(rng.dropout(x, 0.1, key, samples, kernels=k), x), lambda: back(graph(x), x), 4 * row)

    def attended(d: int) -> Case:
        """Causal, a tenth of the weights dropped; torch's own kernel drops others."""
        b, heads, key = 16, max(1, min(h, 768) // d), rng.key(1)
        q, k, v = (leaf(tokens // b, b, heads, d) for _ in range(3))
        samples = torch.arange(b, device=device)

        def ours(kernels: Kernels) -> None:
            dropped = rng.weight_dropout(0.1, key, samples, 0, triton=kernels == "triton")
            back(attention(q, k, v, Variant(dropout=dropped)), q, k, v)

        def theirs(*heads_last: torch.Tensor) -> torch.Tensor:
            heads_first = (x.permute(1, 2, 0, 3) for x in heads_last)
            return scaled_dot_product_attention(*heads_first, dropout_p=0.1, is_causal=True).permute(2, 0, 1, 3)

        graph = torch.compile(theirs, fullgraph=True, dynamic=False)
        return Case(ours, lambda: back(graph(q, k, v), q, k, v), 16 * q.nbytes)

    def losses(ids: int) -> Case:
        """ids: the rest of the vocabulary is padding, which a graph of PyTorch would not have."""
        logits = torch.randn(tokens // 4, vocab, **bf16)
        local, here = logits.new_zeros(len(logits), dtype=torch.int64), logits.new_ones(len(logits), dtype=torch.bool)
        one, wanted = torch.ones(len(logits), device=device), logits[:, :ids].clone().requires_grad_()
        graph = torch.compile(lambda x: cross_entropy(x.float(), local, reduction="sum"), fullgraph=True, dynamic=False)

        def ours(kernels: Kernels) -> None:
            top, *_ = statistics_of(logits, local, here, ids=ids, kernels=kernels)
            gradient_of(logits, top, one, None, local, here, one, ids=ids, kernels=kernels)

        return Case(ours, lambda: torch.autograd.grad(graph(wanted), wanted), 3 * logits.nbytes)

    def update(n: int) -> Case:
        parameters, masters = torch.randn(n, **bf16), torch.randn(n, device=device)
        grads, first, second = (torch.rand(n, device=device) for _ in range(3))
        one, zero = torch.ones((), device=device), torch.zeros((), device=device)
        rates = Update(1e-4, (0.9, 0.95), 1e-8, 0.0, one, one, zero)

        def ours(kernels: Kernels) -> None:
            if kernels == "triton":
                adam_triton(rates, 0.1, parameters, masters, None, grads, first, second)
            else:
                adam_reference(rates, 0.1, masters, grads, first, second)
                parameters.copy_(masters)

        def written_out(parameters: torch.Tensor, masters: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
            g = grads / one
            first.lerp_(g, 0.1)
            second.mul_(0.95).addcmul_(g, g, value=0.05)
            masters.mul_(1 - 1e-5).addcdiv_(first, second.sqrt() / 0.2236 + 1e-8, value=-1e-3)
            parameters.copy_(masters)

        graph = torch.compile(written_out, fullgraph=True, dynamic=False)
        return Case(ours, lambda: graph(parameters, masters, first, second), 30 * n)

    return {
        "adamw, masters": lambda: update(tokens * h),
        "rmsnorm": lambda: norms(True, False),
        "add + rmsnorm": lambda: norms(True, True),
        "layernorm": lambda: norms(False, False),
        "add + layernorm": lambda: norms(False, True),
        "rotary, halves": lambda: turned(False),
        "rotary, pairs": lambda: turned(True),
        "swiglu": lambda: gates("swiglu"),
        "geglu": lambda: gates("geglu"),
        "dropout": dropped,
        "attention with dropout, 64": lambda: attended(64),
        "attention with dropout, 128": lambda: attended(128),
        f"cross-entropy {vocab}": lambda: losses(vocab),
        f"cross-entropy {vocab - 47} of {vocab}": lambda: losses(vocab - 47),
    }


def kernels_beside_others(note: Note, smoke: bool) -> None:
    """The kernel table, noted row by row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, h, vocab = (64, 128, 512) if smoke else (16384, 4096, 50304)
    copy = copy_speed(device, 1 << (16 if smoke else 28))
    serves: Kernels = "triton" if use_triton("auto", device) else "reference"
    rounds = 2 if smoke else 20
    made, rows = cases(device, tokens, h, vocab), {}
    for name, make in made.items():
        rows[name] = tried(lambda make=make: _row(make(), serves, copy, device, rounds)) | {"by": serves}
        note(rows)
    for name, make in (
        made.items() if not smoke else ()
    ):  # last, since each takes seconds to compile; on CPU with a C++ compiler
        rows[name]["compile_ms"] = tried(lambda make=make: 1e3 * seconds_of(make().compiled, device, rounds))
        note(rows)


def _row(case: Case, serves: Kernels, copy: float, device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds of ours and of the reference; share: of the copy speed, by the bytes that must move."""
    ours = seconds_of(lambda: case.call(serves), device, rounds)
    reference = seconds_of(lambda: case.call("reference"), device, rounds)
    return {"ms": 1e3 * ours, "share_of_copy": case.moved / ours / copy, "reference_ms": 1e3 * reference}
