"""Multi-head, grouped-query (arXiv:2305.13245) and multi-query (arXiv:1911.02150) attention over torch's fused kernels."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from megatrain.models.batch import MicroBatch
from megatrain.models.layers import Build
from megatrain.models.position import Rotary
from megatrain.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class KeyValueCache:
    """Keys and values of the tokens seen so far by one layer, [b, g, capacity, d] each."""

    def __init__(self, batch: int, groups: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.empty(batch, groups, capacity, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [b, g, s, d] and return all so far. Raises ValueError beyond the capacity."""
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"{end} tokens do not fit the key-value cache of {self.keys.shape[2]}; model.seq_length is the limit")
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """q|k|v, attention within each of this rank's heads, output matrix; heads are split over tp."""

    def __init__(self, name: str, build: Build) -> None:
        super().__init__()
        config = build.config
        h, d = config.hidden_size, config.head_dim
        shared = {"bias": config.bias, "sequence_parallel": build.sequence_parallel, "dtype": build.dtype, "device": build.device}
        width, groups = config.num_attention_heads * d, config.query_groups
        outputs = [
            (f"{name}.query", width, config.num_attention_heads),
            (f"{name}.key", groups * d, groups),
            (f"{name}.value", groups * d, groups),
        ]
        self.qkv = ColumnParallelLinear(outputs, h, build.tp, init=build.init, **shared)
        self.output = RowParallelLinear(
            f"{name}.output", width, h, config.num_attention_heads, build.tp, init=build.residual_init, **shared
        )
        self.rotary = Rotary(build) if config.position == "rope" else None
        self.head_dim = d

    def forward(self, x: torch.Tensor, batch: MicroBatch, cache: KeyValueCache | None = None) -> torch.Tensor:
        """[s/t or s, b, h] -> the same shape."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x))  # each [s, b, heads, d]
        if self.rotary is not None:
            q, k = self.rotary(batch, q, k)
        q, k, v = (y.permute(1, 2, 0, 3) for y in (q, k, v))  # [b, heads, s, d]
        if cache is not None:
            k, v = cache.extend(k, v)
        y = attend(q, k, v, causal=batch.mask.causal)
        return self.output(y.permute(2, 0, 1, 3).flatten(2))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """Softmax attention: q [b, a, s, d], k and v [b, g, n, d] with n >= s; the queries are the last s of the n tokens."""
    queries, keys = q.shape[2], k.shape[2]
    mask = None
    if causal and 1 < queries < keys:  # a prompt continued from a cache: the triangle is not square
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    square = causal and queries == keys
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=square, enable_gqa=q.shape[1] != k.shape[1]
    )
