"""`MicroBatch`: what every layer may read about the tokens at hand, so that no layer's signature ever changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from megatrain.kernels.attention_mask import CAUSAL, AttentionMask
from megatrain.parallel.param import Postponed


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


# Objectives: what a batch should teach. An objective is one function from a batch to a loss, and the weight it is divided by.


@dataclass(frozen=True)
class Loss:
    """The loss of one micro-batch, summed, not averaged: the division by the global weight happens once."""

    total: torch.Tensor
    """Scalar, carries the gradient."""
    correct: torch.Tensor
    """Scalar, the weight of the tokens predicted right."""
    blanks: torch.Tensor | None = None
    """[2] blanks of which every token was predicted right, and blanks; where there are any, and the model is judged."""


class Scorer(Protocol):
    """What an objective may ask of a model's head."""

    @property
    def training(self) -> bool:
        """Whether the model is being trained, not judged."""

    def cross_entropy(
        self, x: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and labels [s, b] -> (loss [s, b] in nats, correct [s, b])."""


class Objective(Protocol):
    """A weight known before the forward pass, and a summed loss."""

    def weight(self, batch: MicroBatch) -> torch.Tensor:
        """Scalar: what this micro-batch contributes to the divisor (tokens, pairs, ...). Or several: the divisor is their sum, and a
        training step gives each back as `batch.totals`, summed over the global batch."""

    def __call__(self, head: Scorer, hidden: torch.Tensor, batch: MicroBatch) -> Loss:
        """Loss of the last chunk's hidden states [s/t or s, b, h]."""


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the label at every position, weighted by loss_weights; smoothing and z-loss in training alone."""

    label_smoothing: float = field(default=0.0, kw_only=True)
    z_loss: float = field(default=0.0, kw_only=True)

    def weight(self, batch: MicroBatch) -> torch.Tensor:
        """Sum of the loss weights: the number of tokens that count."""
        return batch.loss_weights.sum(dtype=torch.float64)

    def __call__(self, head: Scorer, hidden: torch.Tensor, batch: MicroBatch) -> Loss:
        """Weighted sum over the micro-batch."""
        regular = (self.label_smoothing, self.z_loss) if head.training else ()
        loss, correct = head.cross_entropy(hidden, batch.labels, *regular)
        weights = batch.loss_weights.to(loss.dtype)
        blanks = None if head.training or batch.block_positions is None else filled_blanks(correct, batch)
        return Loss((loss * weights * self.factors(batch)).sum(), (correct * weights).sum().detach(), blanks)

    def factors(self, _batch: MicroBatch) -> torch.Tensor | float:
        """What the loss of each sequence counts, [b] or one number."""
        return 1.0


@dataclass(frozen=True)
class Mixture(NextToken):
    """The sum of several objectives' mean losses, each times its share: every sequence serves one (`batch.kinds`)."""

    shares: tuple[float, ...] = field(kw_only=True)
    """Of each kind; they need not sum to 1."""

    def weight(self, batch: MicroBatch) -> torch.Tensor:
        """[kinds] sums of the loss weights."""
        kinds = torch.zeros_like(batch.samples) if batch.kinds is None else batch.kinds
        sums = batch.loss_weights.sum(0, dtype=torch.float64)
        return sums.new_zeros(len(self.shares)).index_add_(0, kinds, sums)

    def factors(self, batch: MicroBatch) -> torch.Tensor | float:
        """Turns a mean over all tokens into the weighted sum of the means of kinds."""
        if batch.totals is None or batch.kinds is None:
            return 1.0
        # torch.tensor would have the host wait for the device.
        shares = torch.cat([batch.totals.new_full((1,), share) for share in self.shares])
        return (shares * batch.totals.sum() / batch.totals.clamp_min(1e-8))[batch.kinds].to(batch.loss_weights.dtype)


def filled_blanks(correct: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """[2] how many blanks have every token right (what greedy decoding would write, it would write so too), and how many there are.

    correct [s, b]; a blank begins where block_positions is 1.
    """
    counted = batch.loss_weights > 0
    number = (batch.second_positions == 1).cumsum(0)
    wrong = torch.zeros_like(number).scatter_add_(0, number.clamp_max(len(number) - 1), (counted & ~correct.bool()).long())
    blanks = torch.zeros_like(number).scatter_add_(0, number.clamp_max(len(number) - 1), counted.long()) > 0
    return torch.stack([(blanks & (wrong == 0)).sum(), blanks.sum()]).double()
