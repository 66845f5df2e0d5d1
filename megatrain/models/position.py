"""Where a token stands: learned position embeddings, and the slopes of ALiBi. Rotary embeddings are in `rope.py`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from megatrain.models.layers import Build
from megatrain.parallel.param import ParamSpec
from megatrain.parallel.weights import make_parameters


class LearnedPositions(nn.Module):
    """One vector per position, [positions, h], whole on every rank."""

    def __init__(self, name: str, build: Build) -> None:
        super().__init__()
        self.build = build
        shape = (build.config.position_rows, build.config.hidden_size)
        spec = ParamSpec(name, shape, None, build.replicated_partial, init=build.embedding_init, part="embedding")
        self.weight = make_parameters([spec], build.tp, build.dtype, build.device)[0]

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Add to token embeddings x [s/t or s, b, h] the vectors of this rank's rows of `positions` [s, b]."""
        first = self.build.first_position(x.shape[0])
        return x + functional.embedding(positions[first : first + x.shape[0]], self.weight)


def alibi_slopes(heads: int) -> list[float]:
    """The slope of each head (Press et al., arXiv:2108.12409, section 3): a geometric sequence from 2^(-8/n), n a power of 2.

    Any other number of heads takes those of the power of 2 below it, then every second one of the power above it, as the paper's own
    code and BLOOM do.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]
    return slopes + between
