"""The block, and a stack of blocks: what every model family is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from megatrain.models.attention import Attention, KeyValueCache
from megatrain.models.batch import MicroBatch
from megatrain.models.layers import MLP, Build, Dropout, Norm
from megatrain.models.recompute import Remake, recomputed


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
        self.recompute = build.recompute

    def forward(self, x: torch.Tensor, batch: MicroBatch, cache: KeyValueCache | None = None) -> torch.Tensor:
        """[s/t or s, b, h] -> the same shape."""
        if self.recompute == "full":
            return recomputed(lambda x: self._forward(x, batch, cache), x)
        return self._forward(x, batch, cache)

    def _forward(self, x: torch.Tensor, batch: MicroBatch, cache: KeyValueCache | None) -> torch.Tensor:
        y = self.attention(self.attention_norm(x), batch, cache, self._again(self.attention_norm, x))
        x = x + self.attention_dropout(y, batch)
        y = self.mlp(self.mlp_norm(x), batch, self._again(self.mlp_norm, x))
        return x + self.mlp_dropout(y, batch)

    def _again(self, norm: Norm, x: torch.Tensor) -> Remake | None:
        """How to make a norm's output again, where it is not to be kept."""
        return (lambda: norm(x)) if self.recompute == "selective" else None


class Stack(nn.Module):
    """Blocks `layers` (global indices) of a model, in order."""

    def __init__(self, layers: Sequence[int], build: Build) -> None:
        super().__init__()
        self.blocks: Sequence[Block] = nn.ModuleList(Block(index, build) for index in layers)  # type: ignore[assignment]

    def forward(self, x: torch.Tensor, batch: MicroBatch, caches: Sequence[KeyValueCache] | None = None) -> torch.Tensor:
        """[s/t or s, b, h] -> the same shape."""
        for index, block in enumerate(self.blocks):
            x = block(x, batch, None if caches is None else caches[index])
        return x
