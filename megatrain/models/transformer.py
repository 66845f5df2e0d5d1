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
    """Transformer block: attention, then MLP, each a branch beside the residual stream x. model.norm_placement says where norms are:

    pre        x + dropout(branch(norm(x)))              GPT-2 (arXiv:2002.04745)
    post       norm(x + dropout(branch(x)))              the first Transformer (arXiv:1706.03762)
    sandwich   x + dropout(norm(branch(norm(x))))        CogView (arXiv:2105.13290, section 2.4), Gemma 2
    deepnorm   alpha y + dropout(branch(y)), y = norm(x)   DeepNet (arXiv:2203.00555), as GLM-130B writes it: x itself passes no norm by
    """

    def __init__(self, index: int, build: Build) -> None:
        super().__init__()
        name, self.placement = f"layers.{index}", build.config.norm_placement
        sandwich = self.placement == "sandwich"
        self.attention_norm = Norm(f"{name}.attention_norm", build)
        self.attention = Attention(f"{name}.attention", build)
        self.attention_output_norm = Norm(f"{name}.attention_output_norm", build) if sandwich else None
        self.attention_dropout = Dropout(build, index, "attention")
        self.mlp_norm = Norm(f"{name}.mlp_norm", build)
        self.mlp = MLP(f"{name}.mlp", build)
        self.mlp_output_norm = Norm(f"{name}.mlp_output_norm", build) if sandwich else None
        self.mlp_dropout = Dropout(build, index, "mlp")
        self.recompute, self.dtype = build.recompute, build.dtype
        self.alpha = build.config.residual_scale

    def forward(self, x: torch.Tensor, batch: MicroBatch, cache: KeyValueCache | None = None) -> torch.Tensor:
        """[s/t or s, b, h] -> the same shape."""
        if self.recompute == "full":
            return recomputed(lambda x: self._forward(x, batch, cache), x)
        return self._forward(x, batch, cache)

    def _forward(self, x: torch.Tensor, batch: MicroBatch, cache: KeyValueCache | None) -> torch.Tensor:
        post = self.placement == "post"
        h, x = (x, x) if post else self.attention_norm.beside(x)
        bias = self._bias_before_sum(x)
        again = None if post else self._again(self.attention_norm, x)
        y = self.attention(h.to(self.dtype), batch, cache, again, sums_bias=bias is None)
        y = y if self.attention_output_norm is None else self.attention_output_norm(y)
        stream = h if self.placement == "deepnorm" else x
        h, stream, again = self._between(stream, self.attention_dropout(y, batch), bias)
        y = self.mlp(h.to(self.dtype), batch, again)
        y = y if self.mlp_output_norm is None else self.mlp_output_norm(y)
        x = self._sum(stream, self.mlp_dropout(y, batch))
        return self.mlp_norm(x) if post else x

    def _sum(self, stream: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The residual stream with a branch's output."""
        return stream + y if self.alpha == 1 else torch.add(y, stream, alpha=self.alpha)

    def _bias_before_sum(self, x: torch.Tensor) -> torch.Tensor | None:
        """The place of the attention output's bias, where its gradient is summed by the norm between: nothing changes it on the way."""
        unchanged = self.placement == "pre" and not self.attention_dropout.active and x.dtype == self.dtype
        return self.attention.output.bias_place() if unchanged and self.mlp_norm.sums_after(x) else None

    def _between(
        self, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, Remake | None]:
        """Of the stream and the first branch's output: what the second reads, the stream there, how to make the first of these again.

        bias: the place of what was added to y last, where its gradient is to be made here.
        """
        if self.placement == "post":
            total = x + y
            x = self.attention_norm(total)
            return x, x, self._again(self.attention_norm, total)
        if self.placement == "deepnorm":
            total = self._sum(x, y)
            x = self.mlp_norm(total)
            return x, x, self._again(self.mlp_norm, total)
        h, x = self.mlp_norm.after_adding(x, y, bias)
        return h, x, self._again(self.mlp_norm, x)

    def _again(self, norm: Norm, x: torch.Tensor) -> Remake | None:
        """How to make a norm's output again, where it is not to be kept."""
        return (lambda: norm(x).to(self.dtype)) if self.recompute == "selective" else None


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
