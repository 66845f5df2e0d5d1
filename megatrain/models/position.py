"""Where a token stands: learned position embeddings, and rotary embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from megatrain.models.batch import MicroBatch
from megatrain.models.layers import Build
from megatrain.parallel.param import ParamSpec
from megatrain.parallel.weights import make_parameters


class LearnedPositions(nn.Module):
    """One vector per position, [seq_length, h], whole on every rank."""

    def __init__(self, name: str, build: Build) -> None:
        super().__init__()
        self.build = build
        shape = (build.config.seq_length, build.config.hidden_size)
        spec = ParamSpec(name, shape, None, build.replicated_partial, init=build.init)
        self.weight = make_parameters([spec], build.tp, build.dtype, build.device)[0]

    def forward(self, x: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Add to token embeddings x [s/t or s, b, h] the vectors of this rank's rows."""
        first = self.build.first_position(x.shape[0])
        return x + functional.embedding(batch.positions[first : first + x.shape[0]], self.weight)


class _Rotate(torch.autograd.Function):
    """Rotation is orthogonal: its backward is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(x1, cos, out=y[..., :half]).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y[..., half:]).addcmul_(x1, sin)
    return y


class Rotary(nn.Module):
    """Rotary position embedding (Su et al., arXiv:2104.09864), rotating (first half, second half) pairs of each head."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, build: Build) -> None:
        super().__init__()
        config = build.config
        frequencies = config.rope_theta ** -(torch.arange(0, config.head_size, 2, dtype=torch.float64) / config.head_size)
        angles = torch.arange(config.seq_length, dtype=torch.float64)[:, None] * frequencies
        # Tables in the activations' type: one rounding of an exact cosine costs less than BF16 arithmetic around it.
        for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
            self.register_buffer(name, table.to(device=build.device, dtype=build.dtype), persistent=False)

    def forward(self, batch: MicroBatch, *heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rotate each of `heads` [s, b, a, d] by its token's position (below seq_length)."""
        cos, sin = self.cos[batch.positions].unsqueeze(2), self.sin[batch.positions].unsqueeze(2)
        return tuple(_Rotate.apply(x, cos, sin) for x in heads)
