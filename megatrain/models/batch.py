"""`MicroBatch`: the text that every layer may read, so that no layer's signature ever changes; and `Objective`: what the model learns.

An objective is one function from a micro-batch to a loss, and the weight that the loss of a global batch is divided by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

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
    """The objective's weights summed over the global batch, float64 scalar or [n]; None outside of training."""
    extra: Any = None
    """Anything that the objective reads beside the text, such as a second model's outputs (`Model.prepare`)."""
    scale: torch.Tensor | float = 1.0
    """Factor of every loss's gradient: the loss scale over the weight of the global batch."""
    embedding_grad: float = 1.0
    """Factor of the token embedding's gradient, beside that of the model's config."""
    sums: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The step's statistics so far, by name: float64 scalars to which a layer may add (`models/auxiliary.py`)."""
    postponed: Postponed | None = None
    """Where linear layers put weight gradients that wait for their turn (split backward); None: they compute them at once."""

    @property
    def second_positions(self) -> torch.Tensor:
        """block_positions; all 0 where a text has no blanks."""
        return torch.zeros_like(self.positions) if self.block_positions is None else self.block_positions


class Loss(NamedTuple):
    """Sums over one micro-batch, not means: the division by the weight of the global batch happens once."""

    total: torch.Tensor
    """Scalar, carries the gradient."""
    statistics: Mapping[str, torch.Tensor] = {}
    """Scalars under the names that the objective declares; one that is not there counts 0."""
    output: Any = None
    """Anything to be kept of each micro-batch, such as log-probabilities [s, b]."""


class Scorer(Protocol):
    """A model's head, as objectives see it."""

    @property
    def training(self) -> bool:
        """Whether the model is being trained, not evaluated."""

    def cross_entropy(
        self, x: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and labels [s, b] -> (loss [s, b] in nats, correct [s, b])."""


class Objective(Protocol):
    """A weight known before the forward pass, and a summed loss."""

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistics that its losses come with. The sum of "correct" over the weight is reported as accuracy."""

    def weight(self, batch: MicroBatch) -> torch.Tensor:
        """Scalar: this micro-batch's share of the divisor (tokens, pairs, ...). Or [n]: the divisor is their sum."""

    def __call__(self, head: Scorer, hidden: torch.Tensor, batch: MicroBatch) -> Loss:
        """Loss of the last chunk's hidden states [s/t or s, b, h]."""


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the label at every position, weighted by loss_weights; smoothing and z-loss in training alone."""

    label_smoothing: float = field(default=0.0, kw_only=True)
    z_loss: float = field(default=0.0, kw_only=True)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Only "correct", the weight of the tokens predicted right."""
        return ("correct",)

    def weight(self, batch: MicroBatch) -> torch.Tensor:
        """Sum of the loss weights: the number of tokens that count."""
        return batch.loss_weights.sum(dtype=torch.float64)

    def __call__(self, head: Scorer, hidden: torch.Tensor, batch: MicroBatch) -> Loss:
        """Weighted sum over the micro-batch."""
        regular = (self.label_smoothing, self.z_loss) if head.training else ()
        loss, correct = head.cross_entropy(hidden, batch.labels, *regular)
        weights = batch.loss_weights.to(loss.dtype)
        more = {} if head.training else self.evaluated(correct, batch)
        return Loss((loss * weights * self.factors(batch)).sum(), {"correct": (correct * weights).sum(), **more})

    def factors(self, _batch: MicroBatch) -> torch.Tensor | float:
        """Factor of each sequence's loss, [b] or one number."""
        return 1.0

    def evaluated(self, _correct: torch.Tensor, _batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Further statistics in evaluation, from which labels [s, b] are predicted right."""
        return {}
