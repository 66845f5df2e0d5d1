"""Objectives of texts with blanks (GLM, arXiv:2103.10360): blanks filled right are counted, and several kinds of them are weighed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megatrain.models.batch import MicroBatch, NextToken


@dataclass(frozen=True)
class Blanks(NextToken):
    """Next tokens of a text with blanks; an evaluation counts how many blanks are filled right."""

    @property
    def statistics(self) -> tuple[str, ...]:
        """Also, in evaluation: blanks, and those of which every token is predicted right (greedy decoding would write them so)."""
        return (*super().statistics, "blanks_filled", "blanks")

    def evaluated(self, correct: torch.Tensor, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Counts blanks from correct [s, b]; a blank begins where block_positions is 1."""
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
    """Share of each kind; they need not sum to 1."""

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
