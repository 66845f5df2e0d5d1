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


def back(results: Any, *inputs: torch.Tensor) -> None:
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    torch.autograd.grad(results, inputs, [torch.empty_like(y) for y in results])


@dataclass(frozen=True)
class Cases:
    """Makes each case, of so many tokens of width h."""

    device: torch.device
    tokens: int
    h: int

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=self.device)

    def leaf(self, *shape: int) -> torch.Tensor:
        return self.random(*shape).requires_grad_()

    @property
    def row(self) -> int:
        """Bytes of one activation."""
        return 2 * self.tokens * self.h

    def norms(self, rms: bool, added: bool) -> Case:
        x, residual, weight = self.leaf(self.tokens, 1, self.h), self.leaf(self.tokens, 1, self.h), self.leaf(self.h)
        bias = None if rms else self.leaf(self.h)
        ends = [weight] if rms else [weight, bias]
        given = {"eps": 1e-5, "rms": rms}
        if added:
            graph = compiled.compiled(compiled.add_norm, "checks", **given)
            return Case(
                lambda k: back(add_norm(x, residual, weight, bias, kernels=k, **given), x, residual, *ends),
                lambda: back(graph(x, residual, weight, bias), x, residual, *ends),
                8 * self.row,
            )
        graph = compiled.compiled(compiled.norm, "checks", **given)
        return Case(
            lambda k: back(norm(x, weight, bias, kernels=k, **given), x, *ends),
            lambda: back(graph(x, weight, bias), x, *ends),
            5 * self.row,
        )

    def turned(self, interleaved: bool) -> Case:
        d = min(self.h, 128)
        x, angles = self.leaf(self.tokens, 1, self.h // d, d), torch.randn(self.tokens, 1, d // 2, device=self.device)
        cos, sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
        graph = compiled.compiled(compiled.rotary, "checks", interleaved=interleaved)
        return Case(
            lambda k: back(rotary(x, cos, sin, interleaved=interleaved, kernels=k), x),
            lambda: back(graph(x, cos, sin), x),
            4 * self.row,
        )

    def gates(self, kind: str) -> Case:
        both = self.leaf(self.tokens, 1, 2 * self.h)
        graph = compiled.compiled(compiled.activation, "checks", kind=kind)
        return Case(
            lambda k: back(gated(*both.chunk(2, -1), kind, kernels=k), both),
            lambda: back(graph(*both.chunk(2, -1)), both),
            8 * self.row,
        )

    def dropped(self) -> Case:
        x, key, samples = self.leaf(self.tokens // 4, 4, self.h), rng.key(1), torch.arange(4, device=self.device)
        graph = torch.compile(lambda x: dropout(x, 0.1), fullgraph=True, dynamic=False)
        return Case(lambda k: back(rng.dropout(x, 0.1, key, samples, kernels=k), x), lambda: back(graph(x), x), 4 * self.row)

    def attended(self, d: int) -> Case:
        """Causal, a tenth of the weights dropped; torch's own kernel drops others."""
        b, heads, key = 16, max(1, min(self.h, 768) // d), rng.key(1)
        q, k, v = (self.leaf(self.tokens // b, b, heads, d) for _ in range(3))
        samples = torch.arange(b, device=self.device)

        def ours(kernels: Kernels) -> None:
            dropped = rng.weight_dropout(0.1, key, samples, 0, triton=kernels == "triton")
            back(attention(q, k, v, Variant(dropout=dropped)), q, k, v)

        def theirs(*heads_last: torch.Tensor) -> torch.Tensor:
            heads_first = (x.permute(1, 2, 0, 3) for x in heads_last)
            return scaled_dot_product_attention(*heads_first, dropout_p=0.1, is_causal=True).permute(2, 0, 1, 3)

        graph = torch.compile(theirs, fullgraph=True, dynamic=False)
        return Case(ours, lambda: back(graph(q, k, v), q, k, v), 16 * q.nbytes)

    def losses(self, vocab: int, ids: int) -> Case:
        """ids: the rest of the vocabulary is padding, which a graph of PyTorch would not have."""
        logits = self.random(self.tokens // 4, vocab)
        local, here = logits.new_zeros(len(logits), dtype=torch.int64), logits.new_ones(len(logits), dtype=torch.bool)
        one, wanted = torch.ones(len(logits), device=self.device), logits[:, :ids].clone().requires_grad_()
        graph = torch.compile(lambda x: cross_entropy(x.float(), local, reduction="sum"), fullgraph=True, dynamic=False)

        def ours(kernels: Kernels) -> None:
            top, *_ = statistics_of(logits, local, here, ids=ids, kernels=kernels)
            gradient_of(logits, top, one, None, local, here, one, ids=ids, kernels=kernels)

        return Case(ours, lambda: torch.autograd.grad(graph(wanted), wanted), 3 * logits.nbytes)

    def update(self) -> Case:
        n = self.tokens * self.h
        parameters, masters = self.random(n), torch.randn(n, device=self.device)
        grads, first, second = (torch.rand(n, device=self.device) for _ in range(3))
        one, zero = torch.ones((), device=self.device), torch.zeros((), device=self.device)
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


def cases(of: Cases, vocab: int) -> dict[str, Callable[[], Case]]:
    """What makes each case, one after the other, so that one alone is in memory."""
    return {
        "adamw, masters": of.update,
        "rmsnorm": lambda: of.norms(True, False),
        "add + rmsnorm": lambda: of.norms(True, True),
        "layernorm": lambda: of.norms(False, False),
        "add + layernorm": lambda: of.norms(False, True),
        "rotary, halves": lambda: of.turned(False),
        "rotary, pairs": lambda: of.turned(True),
        "swiglu": lambda: of.gates("swiglu"),
        "geglu": lambda: of.gates("geglu"),
        "dropout": of.dropped,
        "attention with dropout, 64": lambda: of.attended(64),
        "attention with dropout, 128": lambda: of.attended(128),
        f"cross-entropy {vocab}": lambda: of.losses(vocab, vocab),
        f"cross-entropy {vocab - 47} of {vocab}": lambda: of.losses(vocab, vocab - 47),
    }


def kernels_beside_others(note: Note, smoke: bool) -> None:
    """The kernel table, noted row by row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, h, vocab = (64, 128, 512) if smoke else (16384, 4096, 50304)
    copy = copy_speed(device, 1 << (16 if smoke else 28))
    serves: Kernels = "triton" if use_triton("auto", device) else "reference"
    rounds = 2 if smoke else 20
    made, rows = cases(Cases(device, tokens, h), vocab), {}
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
