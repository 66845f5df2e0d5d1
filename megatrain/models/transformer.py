"""The block, and a stack of blocks: what every model family is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from megatrain.models.attention import Attention, KeyValueCache
from megatrain.models.batch import MicroBatch
from megatrain.models.layers import MLP, Build, Dropout, Norm


class Block(nn.Module):
    """Pre-norm transformer block: x + dropout(attention(norm(x))), then x + dropout(mlp(norm(x)))."""

    def __init__(self, index: int, build: Build) -> None:
        super().__init__()
        name = f"layers.{index}"
        self.attention_norm = Norm(f"{name}.attention_norm", build)
        self.attention = Attention(f"{name}.attention", build)
        self.attention_dropout = Dropout(build, index, "attention")
        self.mlp_norm = Norm(f"{name}.mlp_norm", build)
        self.mlp = MLP(f"{name}.mlp", build)
        self.mlp_dropout = Dropout(build, index, "mlp")

    def forward(self, x: torch.Tensor, batch: MicroBatch, cache: KeyValueCache | None = None) -> torch.Tensor:
        """[s/t or s, b, h] -> the same shape."""
        y = self.attention(self.attention_norm(x), batch, cache)
        x = x + self.attention_dropout(y, batch)
        return x + self.mlp_dropout(self.mlp(self.mlp_norm(x), batch), batch)


class Stack(nn.Module):
    """Blocks `layers` (global indices) of a model, in order."""

    def __init__(self, layers: Sequence[int], build: Build) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(index, build) for index in layers)

    def forward(self, x: torch.Tensor, batch: MicroBatch, caches: Sequence[KeyValueCache] | None = None) -> torch.Tensor:
        """[s/t or s, b, h] -> the same shape."""
        for index, block in enumerate(self.blocks):
            x = block(x, batch, None if caches is None else caches[index])
        return x
