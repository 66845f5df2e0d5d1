"""`MicroBatch`: what every layer may read about the tokens at hand, so that no layer's signature ever changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatrain.kernels.attention_mask import CAUSAL, AttentionMask
from megatrain.parallel.weights import Postponed


@dataclass(frozen=True)
class MicroBatch:
    """`b` sequences of `s` tokens on one rank; every tensor is [s, b], whole sequences (not split over any axis)."""

    tokens: torch.Tensor
    """[s, b] int64 token ids."""
    labels: torch.Tensor
    """[s, b] int64, the id each position should predict; arbitrary where the weight is 0."""
    loss_weights: torch.Tensor
    """[s, b] float32, 0 where a position does not count."""
    positions: torch.Tensor
    """[s, b] int64 position of each token in its sequence; in GLM that of a blank for all that fills it."""
    samples: torch.Tensor
    """[b] int64 place of each sequence in the global batch of this step: what dropout is keyed by."""
    step: int = 0
    """Optimizer step, from 0: what dropout is keyed by."""
    mask: AttentionMask = CAUSAL
    """Which keys a query may see."""
    block_positions: torch.Tensor | None = None
    """[s, b] int64 second position: the place within a blank's text, from 1, and 0 outside (arXiv:2103.10360, section 2.2)."""
    kinds: torch.Tensor | None = None
    """[b] int64 which of several objectives each sequence was made for."""
    totals: torch.Tensor | None = None
    """What the objective's weights are over the whole global batch, where that is known."""
    postponed: Postponed | None = None
    """Where linear layers put weight gradients that wait for their turn (split backward); None: they compute them at once."""

    @property
    def second_positions(self) -> torch.Tensor:
        """block_positions; all 0 where a text has no blanks."""
        return torch.zeros_like(self.positions) if self.block_positions is None else self.block_positions
