"""`MicroBatch`: what every layer may read about the tokens at hand, so that no layer's signature ever changes."""

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
    """What the objective's weights are over the whole global batch, where that is known."""
    extra: Any = None
    """What the objective reads beside the text, such as a second model's outputs; `Model.prepare` puts it here."""
    postponed: Postponed | None = None
    """Where linear layers put weight gradients that wait for their turn (split backward); None: they compute them at once."""

    @property
    def second_positions(self) -> torch.Tensor:
        """block_positions; all 0 where a text has no blanks."""
        return torch.zeros_like(self.positions) if self.block_positions is None else self.block_positions


# Objectives: what a batch should teach. An objective is one function from a batch to a loss, and the weight it is divided by.


class Loss(NamedTuple):
    """What an objective makes of one micro-batch: sums, not means, since the division by the global weight happens once."""

    total: torch.Tensor
    """Scalar, carries the gradient."""
    statistics: Mapping[str, torch.Tensor] = {}
    """Scalars by name, of those that the objective declares; one that is not there counts 0."""
    output: Any = None
    """Anything to be kept of each micro-batch, such as log-probabilities [s, b]."""


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

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistics that are summed over a global batch. A step reports "correct" over the weight as accuracy."""

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

    @property
    def statistics(self) -> tuple[str, ...]:
        """correct: the weight of the tokens predicted right."""
        return ("correct",)

    def weight(self, batch: MicroBatch) -> torch.Tensor:
        """Sum of the loss weights: the number of tokens that count."""
        return batch.loss_weights.sum(dtype=torch.float64)

    def __call__(self, head: Scorer, hidden: torch.Tensor, batch: MicroBatch) -> Loss:
        """Weighted sum over the micro-batch."""
        regular = (self.label_smoothing, self.z_loss) if head.training else ()
        loss, correct = head.cross_entropy(hidden, batch.labels, *regular)
        weights = batch.loss_weights.to(loss.dtype)
        statistics = {"correct": (correct * weights).sum(), **self.judged(head, correct, batch)}
        return Loss((loss * weights * self.factors(batch)).sum(), statistics)

    def judged(self, _head: Scorer, _correct: torch.Tensor, _batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Further statistics, from which labels [s, b] were predicted right."""
        return {}

    def factors(self, _batch: MicroBatch) -> torch.Tensor | float:
        """What the loss of each sequence counts, [b] or one number."""
        return 1.0


@dataclass(frozen=True)
class Blanks(NextToken):
    """Next tokens of a text with blanks (GLM); where the model is judged, not trained, it is counted how many blanks it fills right."""

    @property
    def statistics(self) -> tuple[str, ...]:
        """Besides, in evaluation: blanks, and those of which every token is predicted right (greedy decoding would write them so)."""
        return (*super().statistics, "blanks_filled", "blanks")

    def judged(self, head: Scorer, correct: torch.Tensor, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Blanks are counted from correct [s, b]; one begins where block_positions is 1."""
        if head.training:
            return {}
        counted = batch.loss_weights > 0
        number = (batch.second_positions == 1).cumsum(0).clamp_max(len(counted) - 1)
        none = torch.zeros_like(number)
        wrong = none.scatter_add(0, number, (counted & ~correct.bool()).long())
        blanks = none.scatter_add(0, number, counted.long()) > 0
        return {"blanks_filled": (blanks & (wrong == 0)).sum(), "blanks": blanks.sum()}


@dataclass(frozen=True)
class Mixture(Blanks):
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
