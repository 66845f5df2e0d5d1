"""Objectives: what a batch should teach. An objective is one function from a batch to a loss, and the weight it is divided by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from megatrain.models.batch import MicroBatch


@dataclass(frozen=True)
class Loss:
    """The loss of one micro-batch, summed, not averaged: the division by the global weight happens once."""

    total: torch.Tensor
    """Scalar, carries the gradient."""
    correct: torch.Tensor
    """Scalar, the weight of the tokens predicted right."""


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
        """Scalar: what this micro-batch contributes to the divisor (tokens, pairs, ...)."""

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
        return Loss((loss * weights).sum(), (correct * weights).sum().detach())
