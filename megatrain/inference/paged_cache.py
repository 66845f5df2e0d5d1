"""Keys and values of one layer in blocks that all sequences share, and attention over them.

    slots      0 .. 15 | 16 .. 31 | 32 .. 47 | ...       slot = block * size of a block + place in the block
    holder       A     |    B     |    A     |           sequence A has its first 16 tokens in block 0, the next ones in block 2

A step's rows are tokens of several sequences, one after the other [n, 1, h]: first those that read one token each, then chunks of
prompts. All keys are written before any is read, so that sequences may share blocks that the same step fills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch

from megatrain.kernels.attention import Variant, attention
from megatrain.kernels.paged_attention import Pages, paged_attention


@dataclass(frozen=True)
class Chunk:
    """Neighbouring tokens of one sequence, which end the tokens it has so far."""

    rows: slice
    slots: torch.Tensor | None
    """[m] slots of all its tokens so far; None where the chunk is all."""
    prefix: torch.Tensor | None
    """[1] number of first tokens that all see; None: none."""


@dataclass(frozen=True)
class StepPages:
    """Where a step's tokens go, and what each sees; the same for all layers."""

    slots: torch.Tensor
    """[n] slot of each row's key and value."""
    single: int
    """Number of rows, from the first on, that are the next token of a sequence each."""
    pages: Pages | None
    """The pages of those sequences; None without any."""
    chunks: Sequence[Chunk]


class LayerPages:
    """The keys and values of one layer, [slots, g, d] each."""

    def __init__(self, slots: int, groups: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        # Zeros, not anything: what is masked is multiplied by 0, and memory that nobody has written may hold nan.
        self.keys = torch.zeros(slots, groups, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)


@dataclass(frozen=True)
class PagedCache:
    """One layer's keys and values in one step: what the layer is given."""

    layer: LayerPages
    step: StepPages

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant) -> torch.Tensor:
        """Keep k and v [n, 1, g, d], and let each of q [n, 1, a, d] see the tokens of its sequence -> [n, 1, a d]."""
        layer, step = self.layer, self.step
        layer.keys.index_copy_(0, step.slots, k[:, 0])
        layer.values.index_copy_(0, step.slots, v[:, 0])
        output = q.new_empty(len(q), 1, q.shape[2] * q.shape[3])
        if step.pages is not None:
            mask = variant.mask
            output[: step.single, 0] = paged_attention(
                q[: step.single, 0],
                layer.keys,
                layer.values,
                step.pages,
                window=mask.window,
                sparse=None if mask.sparse is None else astuple(mask.sparse),
                slopes=variant.slopes,
                kernels=variant.kernels,
            )
        for chunk in step.chunks:
            keys, values = k[chunk.rows], v[chunk.rows]
            if chunk.slots is not None:
                keys, values = layer.keys[chunk.slots][:, None], layer.values[chunk.slots][:, None]
            seen = variant if chunk.prefix is None else replace(variant, mask=replace(variant.mask, prefix=chunk.prefix))
            output[chunk.rows] = attention(q[chunk.rows], keys, values, seen)
        return output
