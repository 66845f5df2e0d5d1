"""Multi-head, grouped-query (arXiv:2305.13245) and multi-query (arXiv:1911.02150) attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from megatrain.config.schema import Config
from megatrain.kernels import compiled
from megatrain.kernels.attention import Variant, attention
from megatrain.kernels.attention_dropout import Dropout
from megatrain.kernels.beside import together
from megatrain.kernels.dispatch import use_triton
from megatrain.kernels.rotary import Turns, heads, rotary
from megatrain.kernels.sdpa import Choice, Shape, choose
from megatrain.models.batch import MicroBatch
from megatrain.models.layers import Build, Norm
from megatrain.models.position import alibi_slopes
from megatrain.models.recompute import Remake
from megatrain.parallel import rng
from megatrain.parallel.tensor_parallel import ColumnParallelLinear, Linears, RowParallelLinear


def kernels_of(config: Config, tp_size: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """Which of torch's kernels serve a run's causal attention: tried on a GPU, once, where its training has no other attention."""
    model, data = config.model, config.data
    masked = model.window or model.sparse or data.isolate_documents or data.objective == "glm"
    if masked or model.position == "alibi" or model.attention_dropout > 0 or not model.softmax_fp32:
        return Choice()
    heads, groups = model.num_attention_heads // tp_size, max(1, model.query_groups // tp_size)
    shape = Shape(model.seq_length, config.train.micro_batch_size, heads, groups, model.head_size)
    return choose(shape, dtype, device, config.train.deterministic)


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


class KeyValueCache:
    """Keys and values of the tokens seen so far by one layer, [room, b, g, d] each; the room doubles up to the capacity."""

    def __init__(self, batch: int, groups: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = capacity
        self.keys = torch.empty(min(capacity, 512), batch, groups, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [s, b, g, d] and return all so far. Raises ValueError beyond the capacity."""
        end = self.length + keys.shape[0]
        if end > self.capacity:
            raise ValueError(
                f"{end} tokens do not fit the key-value cache of {self.capacity}; model.max_positions is the limit"
            )
        if end > self.keys.shape[0]:
            room = min(max(end, 2 * self.keys.shape[0]), self.capacity)
            self.keys, self.values = self._wider(self.keys, room), self._wider(self.values, room)
        self.keys[self.length : end] = keys
        self.values[self.length : end] = values
        self.length = end
        return self.keys[:end], self.values[:end]

    def _wider(self, held: torch.Tensor, room: int) -> torch.Tensor:
        """[room, b, g, d] that begins with what is held."""
        wider = held.new_empty(room, *held.shape[1:])
        wider[: self.length] = held[: self.length]
        return wider

    def select(self, sequences: Sequence[int], length: int) -> None:
        """Go on with the first `length` tokens of these sequences."""
        index = torch.tensor(list(sequences), device=self.keys.device)
        self.keys, self.values, self.length = self.keys.index_select(1, index), self.values.index_select(1, index), length


class Attention(nn.Module):
    """q|k|v, attention within each of this rank's heads, output matrix; heads are split over tp."""

    slopes: torch.Tensor | None

    def __init__(self, name: str, build: Build) -> None:
        super().__init__()
        self.name, self.build = name, build
        config = build.config
        h, d = config.hidden_size, config.head_size
        shared = build.linears("attention")
        qkv: Linears = {**shared, "bias": config.qkv_biased}
        width, groups = config.num_attention_heads * d, config.query_groups
        outputs = [
            (f"{name}.query", width, config.num_attention_heads),
            (f"{name}.key", groups * d, groups),
            (f"{name}.value", groups * d, groups),
        ]
        inits = [build.init(h, width), build.init(h, groups * d), build.branch_init(h, groups * d)]
        self.qkv = ColumnParallelLinear(outputs, h, build.tp, init=inits, **qkv)
        init = build.residual_init(width, h)
        self.output = RowParallelLinear(f"{name}.output", width, h, config.num_attention_heads, build.tp, init=init, **shared)
        # Every rank of tp sees other heads, so the gradients of these norms are partial sums.
        self.query_norm = Norm(f"{name}.query_norm", build, d, "tp") if config.qk_norm else None
        self.key_norm = Norm(f"{name}.key_norm", build, d, "tp") if config.qk_norm else None
        self.rotary = Rotary(build) if config.rotary else None
        self.head_dim = d
        heads = config.num_attention_heads // build.tp.size
        self.first_head = build.tp.rank * heads
        slopes = alibi_slopes(config.num_attention_heads)[self.first_head : self.first_head + heads]
        wide = torch.promote_types(build.dtype, torch.float32)
        mine = torch.tensor(slopes, dtype=wide, device=build.device) if config.position == "alibi" else None
        self.register_buffer("slopes", mine, persistent=False)

    @property
    def key_heads(self) -> int:
        """Key heads on this rank."""
        return self.qkv.weights[1].shape[0] // self.head_dim

    def forward(
        self,
        x: torch.Tensor,
        batch: MicroBatch,
        cache: KeyValueCache | None = None,
        remake: Remake | None = None,
        sums_bias: bool = True,
    ) -> torch.Tensor:
        """[s/t or s, b, h] -> the same shape.

        remake: makes x again, so that it is not kept. sums_bias: False where `output.bias_place` is given its bias's gradient.
        """
        q, k, v = self._heads(x, batch, remake)
        if cache is not None:
            k, v = cache.extend(k, v)
        variant = Variant(batch.mask, self.slopes, self._dropout(batch), self.build.config.softmax_fp32, self.build.fused)
        return self.output(attention(q, k, v, variant), batch.postponed, sums_bias=sums_bias)

    def _heads(self, x: torch.Tensor, batch: MicroBatch, remake: Remake | None) -> tuple[torch.Tensor, ...]:
        """[s/t or s, b, h] -> what attention multiplies, each [s, b, heads, d]."""
        turned = self.rotary if self.query_norm is None else None  # else norms stand between
        if turned is not None and turned.apart is not None:
            whole = together(*self.qkv(x, batch.postponed, remake))
            return turned.apart(whole, tuple(turned.tables(batch)), groups=self.key_heads)
        bias = self.qkv.bias_place()
        q, k, v = self.qkv(x, batch.postponed, remake, sums_bias=bias is None)
        turns = None if turned is None else turned.turns(batch)
        q, k, v = heads(q, k, v, self.head_dim, turns, bias=bias, kernels=self.build.kernels)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
            if self.rotary is not None:
                q, k = self.rotary(batch, q, k)
        return q, k, v

    def _dropout(self, batch: MicroBatch) -> Dropout | None:
        """Dropout of attention's weights, keyed by (sample, head, query, key): the same under every layout."""
        p = self.build.config.attention_dropout
        if p == 0 or not self.training:
            return None
        key = rng.key(self.build.seed, "attention dropout", batch.step, self.name)
        return rng.weight_dropout(p, key, batch.samples, self.first_head, use_triton(self.build.kernels, self.build.device))
