"""The layers of a block, norms, attention, MLP and dropout, and learned positions. Each is built with one value, a `Build`.

Activations are [s/t, b, h] with sequence parallelism, else [s, b, h]; which rows a rank has between linear layers says `build.rows`.
Attention's heads and the MLP's inner columns are split over tp, so a rank has [s, b, a/t, d] of queries and [s, b, f/t] inside an MLP.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.nn import functional

from megatrain.config.schema import ModelConfig
from megatrain.kernels import compiled
from megatrain.kernels.attention import Variant, attention
from megatrain.kernels.attention_dropout import WeightDropout
from megatrain.kernels.beside import together
from megatrain.kernels.dispatch import Kernels, use_triton
from megatrain.kernels.gated import GATES, activated, gated
from megatrain.kernels.norm import add_biased_norm, add_norm, norm, norm_beside, norm_compiled
from megatrain.kernels.rotary import Turns, heads, rotary
from megatrain.kernels.sdpa import STEADY, Fused
from megatrain.models.batch import MicroBatch
from megatrain.models.position import alibi_slopes, tables
from megatrain.parallel import rng
from megatrain.parallel.param import ONES, ZEROS, Init, ParamSpec, Place, make_parameters
from megatrain.parallel.tensor_parallel import Backward, ColumnParallelLinear, Matrix, Remake, RowParallelLinear


@dataclass(frozen=True)
class Build(Place):
    """The value that every layer of one model is built with: where it lies, which model it is, and how it runs."""

    config: ModelConfig
    vocab_size: int
    seed: int
    """Seed of the weights and of dropout."""
    recompute: Literal["none", "selective", "full"] = "none"
    loss_chunk: int = 0
    """Tokens of a micro-batch whose logits exist at a time; 0: all."""
    kernels: Kernels = "auto"
    """Which implementation of an operation serves (kernels/dispatch.py)."""
    compile: bool = False
    """Whether what lies between matrix products is compiled (kernels/compiled.py)."""
    fused: tuple[Fused, ...] = STEADY
    """Which of torch's kernels for causal attention serve on a GPU, best first (kernels/sdpa.py)."""
    tied_over: str | None = None
    """Axis over which the embedding's rank and the head's each hold a copy of a tied matrix; None where one rank has both."""

    def init(self, inputs: int, outputs: int) -> Init:
        """Initial values of a matrix [outputs, inputs] that reads the residual stream."""
        c = self.config
        std = {
            "normal": c.init_std,
            "small": (2 / (5 * c.hidden_size)) ** 0.5,
            "fan_in": inputs**-0.5,
            "xavier": (2 / (inputs + outputs)) ** 0.5,
        }[c.init]
        return Init("normal", std)

    def residual_init(self, inputs: int, outputs: int) -> Init:
        """Initial values of a matrix that writes into the residual stream, 2 a block: their sum keeps its variance (GPT-2, section 2.3)."""
        plain = self.init(inputs, outputs)
        return Init("normal", plain.value / (2 * self.config.num_layers) ** 0.5) if self.config.scale_residual_init else plain

    def branch_init(self, inputs: int, outputs: int) -> Init:
        """Initial values of attention's values and of an MLP's inner matrices: DeepNorm scales them too (arXiv:2203.00555, figure 2)."""
        scaled = self.config.norm_placement == "deepnorm"
        return self.residual_init(inputs, outputs) if scaled else self.init(inputs, outputs)

    @property
    def embedding_init(self) -> Init:
        """Initial values of token and position embeddings, which are looked up: their one input is a token."""
        c = self.config
        if c.embedding_init_std is not None:
            return Init("normal", c.embedding_init_std)
        return Init("normal", c.init_std) if c.init == "xavier" else self.init(c.hidden_size, c.hidden_size)

    @functools.cached_property
    def rotary_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [positions, r/2]; they may be long, so there is one of each in a model."""
        return tables(self.config, self.dtype, self.device)

    @property
    def residual_dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        return torch.promote_types(self.dtype, torch.float32) if self.config.residual_fp32 else self.dtype


class Norm(nn.Module):
    """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467) over the last dim; statistics in at least float32."""

    def __init__(self, name: str, build: Build, width: int | None = None, partial: str | None = None) -> None:
        """width: of what is normalised, h by default; partial: the axis over which the gradients of its parameters are partial sums."""
        super().__init__()
        config, shape = build.config, (width or build.config.hidden_size,)
        spec = functools.partial(
            ParamSpec, shape=shape, partial_over=partial or build.rows.partial_over, decay=False, part="norm"
        )
        self.weight = make_parameters([spec(f"{name}.weight", init=ONES)], build)[0]
        has_bias = config.norm == "layernorm" and config.bias
        self.bias = make_parameters([spec(f"{name}.bias", init=ZEROS)], build)[0] if has_bias else None
        settings: dict[str, Any] = {"eps": config.norm_eps, "rms": config.norm == "rmsnorm"}
        self.alone: Callable[..., Any] = functools.partial(norm, kernels=build.kernels, **settings)
        self.added: Callable[..., Any] = functools.partial(add_norm, kernels=build.kernels, **settings)
        self.both: Callable[..., Any] | None = functools.partial(norm_beside, kernels=build.kernels, **settings)
        self.added_biased: Callable[..., Any] = functools.partial(add_biased_norm, kernels=build.kernels, **settings)
        self.kernels, self.own = build.kernels, not build.compile
        if build.compile:
            self.both = None
            purpose = name.rsplit(".", 1)[-1]
            self.alone = compiled.compiled(compiled.norm, purpose, **settings)
            self.added = compiled.compiled(compiled.add_norm, purpose, **settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., h]."""
        y: torch.Tensor = self.alone(x, self.weight, self.bias)
        return y

    def beside(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x), x), both [..., h], for callers that use x as well."""
        if self.both is None:
            return self(x), x
        both: tuple[torch.Tensor, torch.Tensor] = self.both(x, self.weight, self.bias)
        return both

    def after_adding(
        self, x: torch.Tensor, residual: torch.Tensor, residual_bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual), both [..., h].

        residual_bias: stands for what was added to residual before, [h], where `sums_after` x; its gradient is made here.
        """
        both: tuple[torch.Tensor, torch.Tensor]
        if residual_bias is None:
            both = self.added(x, residual, self.weight, self.bias)
        else:
            both = self.added_biased(x, residual, self.weight, self.bias, residual_bias)
        return both

    def sums_after(self, x: torch.Tensor) -> bool:
        """Whether the backward of x and a residual of its dtype has the sums of a bias's gradient without another pass."""
        return self.own and norm_compiled(self.kernels, x)


class Dropout(nn.Module):
    """Dropout whose mask is a function of (seed, step, sample, position, layer, site): the same under every layout."""

    def __init__(self, build: Build, *where: str | int) -> None:
        super().__init__()
        self.build, self.where = build, where

    @property
    def active(self) -> bool:
        """Whether anything is dropped."""
        return self.training and self.build.config.dropout > 0

    def forward(self, x: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """[s/t or s, b, h] -> the same shape."""
        if not self.active:
            return x
        p = self.build.config.dropout
        key = rng.key(self.build.seed, "dropout", batch.step, *self.where)
        places = self.build.rows.held(len(batch.tokens))
        return rng.dropout(x, p, key, batch.samples, places, kernels=self.build.kernels)


class MLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) for gated activations (arXiv:2002.05202)."""

    def __init__(self, name: str, build: Build) -> None:
        super().__init__()
        config = build.config
        h, f = config.hidden_size, config.ffn_size
        outputs = [
            Matrix(f"{name}.{n}", h, f, f, build.branch_init(h, f)) for n in (("gate", "up") if config.gated else ("up",))
        ]
        down = Matrix(f"{name}.down", f, h, f, build.residual_init(f, h))
        self.inner = ColumnParallelLinear(outputs, build, bias=config.bias, part="mlp")
        self.down = RowParallelLinear(down, build, bias=config.bias, part="mlp")
        self.activation, self.kernels = config.activation, build.kernels
        self.fused = compiled.compiled(compiled.activation, "mlp", kind=config.activation) if build.compile else None

    def forward(self, x: torch.Tensor, batch: MicroBatch, remake: Remake | None = None) -> torch.Tensor:
        """[s/t or s, b, h] -> the same shape. remake: makes x again, so that neither it nor the activation is kept."""
        bias = self.inner.bias_proxy() if self.fused is None else None
        inner = self.inner(x, Backward(batch.postponed, remake, sums_bias=bias is None))
        cheaper_kept = remake is None or self.activation == "relu"  # its own backward keeps the output, not the input
        again = None if cheaper_kept else (lambda: self._activate(inner, None, keep=False))
        return self.down(self._activate(inner, bias, keep=remake is None), Backward(batch.postponed, again))

    def _activate(self, inner: tuple[torch.Tensor, ...], bias: torch.Tensor | None, keep: bool) -> torch.Tensor:
        """One or two [s, b, f/t] -> [s, b, f/t]. bias: the inner ones' proxy; keep: whether what the backward reads twice may be kept."""
        if self.fused is not None:
            return self.fused(together(*inner))
        if self.activation not in GATES:
            return activated(inner[0], self.activation, bias=bias, kernels=self.kernels)
        gate, up = inner
        return gated(gate, up, self.activation, bias=bias, keep=keep, kernels=self.kernels)


def scaled_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """x, whose gradient is multiplied: factor x + (1 - factor) x held constant (GLM-130B, arXiv:2210.02414, section 3.3)."""
    scaled: torch.Tensor = x if factor == 1 else _ScaledGradient.apply(x, factor)
    return scaled


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return dy * ctx.factor, None


class LearnedPositions(nn.Module):
    """One vector per position, [positions, h], whole on every rank."""

    def __init__(self, name: str, build: Build) -> None:
        super().__init__()
        self.rows = build.rows
        shape = (build.config.position_rows, build.config.hidden_size)
        spec = ParamSpec(name, shape, None, self.rows.partial_over, init=build.embedding_init, part="embedding")
        self.weight = make_parameters([spec], build)[0]

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Add to token embeddings x [s/t or s, b, h] the vectors of this rank's rows of `positions` [s, b]."""
        return x + functional.embedding(self.rows.of(positions), self.weight)


class Rotary(nn.Module):
    """The tables of cosines and sines [positions, r/2], which all layers of a model share, and the rotation."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, build: Build) -> None:
        super().__init__()
        config = build.config
        interleaved = config.rope_interleaved
        self.turn: Callable[..., torch.Tensor] = partial(rotary, kernels=build.kernels, interleaved=interleaved)
        self.apart: Callable[..., tuple[torch.Tensor, ...]] | None = None
        if build.compile:
            self.turn = compiled.compiled(compiled.rotary, "rotary", interleaved=interleaved)
            self.apart = compiled.compiled(compiled.heads, "heads", d=config.head_size, interleaved=interleaved)
        self.interleaved, self.halves = interleaved, 2 if config.position == "rope_2d" else 1
        for name, table in zip(("cos", "sin"), build.rotary_tables, strict=True):
            self.register_buffer(name, table, persistent=False)

    def forward(self, batch: MicroBatch, *heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rotate each of `heads` [s, b, a, d] by its token's positions."""
        tables = self.tables(batch)
        return tuple(self._rotate(x, tables) for x in heads)

    def turns(self, batch: MicroBatch) -> Turns:
        """By which angles the tokens' heads turn."""
        return Turns(self.cos, self.sin, self._places(batch), self.interleaved)

    def tables(self, batch: MicroBatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Cosines and sines [s, b, r/2] of the tokens, for heads or for both halves of heads."""
        return [(self.cos[of], self.sin[of]) for of in self._places(batch)]

    def _places(self, batch: MicroBatch) -> tuple[torch.Tensor, ...]:
        return (batch.positions,) if self.halves == 1 else (batch.positions, batch.second_positions)

    def _rotate(self, x: torch.Tensor, tables: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """[s, b, a, d] -> the same shape."""
        if self.halves == 1:
            return self.turn(x, *tables[0])
        parts = x.chunk(self.halves, -1)
        return torch.cat([self.turn(part, *of) for part, of in zip(parts, tables, strict=True)], -1)


class Cache(Protocol):
    """Keys and values of the tokens that one layer has seen so far, in decoding."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant) -> torch.Tensor:
        """Keep k, v [s, b, g, d]; what q [s, b, a, d] makes of them and of those before, [s, b, a d]."""


class Mixer(Protocol):
    """The layer of a block that mixes the tokens of a sequence: attention, or another that is called alike."""

    cache_shape: tuple[int, int]
    """(heads, numbers of each) of the keys, and of the values, that a cache keeps of a token on this rank."""

    def __call__(
        self, x: torch.Tensor, batch: MicroBatch, cache: Cache | None, remake: Remake | None, sums_bias: bool
    ) -> torch.Tensor:
        """[s/t or s, b, h] -> the same shape, as `Attention.forward`."""

    def bias_proxy(self) -> torch.Tensor | None:
        """The proxy of the bias that is added last (`RowParallelLinear.bias_proxy`); None without one."""


class Attention(nn.Module):
    """Multi-head, grouped-query (arXiv:2305.13245) or multi-query (arXiv:1911.02150) attention; heads are split over tp."""

    slopes: torch.Tensor | None

    def __init__(self, name: str, build: Build, window: int | None = None) -> None:
        """window: keys that a query sees, its own included; None: all that the batch's mask allows."""
        super().__init__()
        self.name, self.build, self.window = name, build, window
        config = build.config
        h, d = config.hidden_size, config.head_size
        all_heads, groups = config.num_attention_heads, config.query_groups
        width, narrow = all_heads * d, groups * d
        qkv = [
            Matrix(f"{name}.query", h, width, all_heads, build.init(h, width)),
            Matrix(f"{name}.key", h, narrow, groups, build.init(h, narrow)),
            Matrix(f"{name}.value", h, narrow, groups, build.branch_init(h, narrow)),
        ]
        output = Matrix(f"{name}.output", width, h, all_heads, build.residual_init(width, h))
        self.qkv = ColumnParallelLinear(qkv, build, bias=config.qkv_biased, part="attention")
        self.output = RowParallelLinear(output, build, bias=config.bias, part="attention")
        # Every rank of tp sees other heads, so the gradients of these norms are partial sums.
        self.query_norm = Norm(f"{name}.query_norm", build, d, "tp") if config.qk_norm else None
        self.key_norm = Norm(f"{name}.key_norm", build, d, "tp") if config.qk_norm else None
        self.rotary = Rotary(build) if config.rotary else None
        self.cache_shape = (self.qkv.weights[1].shape[0] // d, d)
        mine = all_heads // build.tp.size
        self.first_head = build.tp.rank * mine
        slopes = alibi_slopes(all_heads)[self.first_head : self.first_head + mine]
        wide = torch.promote_types(build.dtype, torch.float32)
        alibi = torch.tensor(slopes, dtype=wide, device=build.device) if config.position == "alibi" else None
        self.register_buffer("slopes", alibi, persistent=False)

    def bias_proxy(self) -> torch.Tensor | None:
        """The proxy of the output's bias; None without one."""
        return self.output.bias_proxy()

    def forward(
        self,
        x: torch.Tensor,
        batch: MicroBatch,
        cache: Cache | None = None,
        remake: Remake | None = None,
        sums_bias: bool = True,
    ) -> torch.Tensor:
        """[s/t or s, b, h] -> the same shape.

        remake: makes x again, so that it is not kept. sums_bias: False where `bias_proxy` is given its bias's gradient.
        """
        q, k, v = self._heads(x, batch, remake)
        build = self.build
        mask = batch.mask.within(self.window, build.config.sparse)
        variant = Variant(mask, self.slopes, self._dropout(batch), build.config.softmax_fp32, build.fused, build.kernels)
        y = attention(q, k, v, variant) if cache is None else cache.attend(q, k, v, variant)
        return self.output(y, Backward(batch.postponed, sums_bias=sums_bias))

    def _heads(self, x: torch.Tensor, batch: MicroBatch, remake: Remake | None) -> tuple[torch.Tensor, ...]:
        """[s/t or s, b, h] -> what attention multiplies, each [s, b, heads, d]."""
        turned = self.rotary if self.query_norm is None else None  # else norms stand between
        if turned is not None and turned.apart is not None:
            whole = together(*self.qkv(x, Backward(batch.postponed, remake)))
            return turned.apart(whole, tuple(turned.tables(batch)), groups=self.cache_shape[0])
        bias = self.qkv.bias_proxy()
        q, k, v = self.qkv(x, Backward(batch.postponed, remake, sums_bias=bias is None))
        turns = None if turned is None else turned.turns(batch)
        q, k, v = heads(q, k, v, self.cache_shape[1], turns, bias=bias, kernels=self.build.kernels)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
            if self.rotary is not None:
                q, k = self.rotary(batch, q, k)
        return q, k, v

    def _dropout(self, batch: MicroBatch) -> WeightDropout | None:
        """Dropout of attention's weights, keyed by (sample, head, query, key): the same under every layout."""
        p = self.build.config.attention_dropout
        if p == 0 or not self.training:
            return None
        key = rng.key(self.build.seed, "attention dropout", batch.step, self.name)
        return rng.weight_dropout(p, key, batch.samples, self.first_head, use_triton(self.build.kernels, self.build.device))
