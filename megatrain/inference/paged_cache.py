"""Keys and values of one layer in blocks that all sequences share, and attention over them.

    slots      0 .. 15 | 16 .. 31 | 32 .. 47 | ...       slot = block * size of a block + place in the block
    holder       A     |    B     |    A     |           sequence A has its first 16 tokens in block 0, the next ones in block 2

A step's rows are tokens of several sequences, one after the other [n, 1, h]: first those that read one token each, then chunks of
prompts. All keys are written before any is read, so that sequences may share blocks that the same step fills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch

from megatrain.kernels.attention import Variant
from megatrain.kernels.paged_attention import Pages, paged_attention


class StepPages(NamedTuple):
    """Where a step's tokens go, and what each sees; the same for all layers."""

    slots: torch.Tensor
    """[m] slot of each row's key and value; rows behind them are no tokens (`steady_rows`)."""
    parts: Sequence[tuple[slice, Pages]]
    """Rows, and the pages of the sequences that they belong to."""


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
        layer, step, mask = self.layer, self.step, variant.mask
        count = len(step.slots)
        layer.keys.index_copy_(0, step.slots, k[:count, 0])
        layer.values.index_copy_(0, step.slots, v[:count, 0])
        output = q.new_empty(len(q), 1, q.shape[2] * q.shape[3])
        output[count:] = 0
        for rows, pages in step.parts:
            output[rows, 0] = paged_attention(
                q[rows, 0],
                layer.keys,
                layer.values,
                pages,
                window=mask.window,
                sparse=None if mask.sparse is None else astuple(mask.sparse),
                slopes=variant.slopes,
                kernels=variant.kernels,
            )
        return output
