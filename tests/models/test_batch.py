"""Objectives: what they weigh, and which statistics they declare and give."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatrain.models.batch import MicroBatch, NextToken
from megatrain.models.blanks import Blanks, Mixture

LABELS = torch.tensor([[7, 7], [7, 7], [7, 7], [7, 7], [7, 7], [7, 7]])
WEIGHTS = torch.tensor([[0, 0], [1, 0], [1, 1], [1, 0], [1, 0], [0, 0]], dtype=torch.float32)
INSIDE = torch.tensor([[0, 0], [1, 0], [2, 1], [1, 1], [2, 0], [1, 0]])
"""Two sequences: in the first a blank in rows 1-2, one in rows 3-4 and one that does not count; in the second one in row 2, and another."""
RIGHT = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 1], [0, 1], [1, 1]], dtype=torch.bool)
BATCH = MicroBatch(
    LABELS, LABELS, WEIGHTS, torch.zeros_like(LABELS), torch.arange(2), block_positions=INSIDE, kinds=torch.tensor([0, 1])
)


def head(training):
    """A head that predicts what RIGHT says, with a loss of 0.5 everywhere."""
    losses = torch.full(LABELS.shape, 0.5, dtype=torch.float64)
    return SimpleNamespace(training=training, cross_entropy=lambda *_: (losses, RIGHT))


@pytest.mark.parametrize("objective", [NextToken(), Blanks(), Mixture(shares=(1.0, 1.0))], ids=lambda o: type(o).__name__)
def test_objectives_give_the_statistics_that_they_declare(objective):
    loss = objective(head(training=False), torch.zeros(()), BATCH)
    assert tuple(loss.statistics) == objective.statistics
    assert (loss.total, loss.statistics["correct"], loss.output) == (2.5, 4.0, None)
    assert tuple(objective(head(training=True), torch.zeros(()), BATCH).statistics) == ("correct",)


def test_a_blank_is_filled_where_every_token_that_counts_is_right():
    statistics = Blanks()(head(training=False), torch.zeros(()), BATCH).statistics
    assert {name: x.item() for name, x in statistics.items()} == {"correct": 4.0, "blanks_filled": 2, "blanks": 3}
    none = replace(BATCH, loss_weights=torch.zeros_like(WEIGHTS))
    assert Blanks()(head(training=False), torch.zeros(()), none).statistics["blanks"] == 0


def test_a_mixture_is_the_sum_of_the_means_of_its_kinds():
    mixture = Mixture(shares=(2.0, 4.0))
    totals = mixture.weight(BATCH)
    assert totals.tolist() == [4.0, 1.0]
    loss = mixture(head(training=True), torch.zeros(()), replace(BATCH, totals=totals))
    assert loss.total / totals.sum() == pytest.approx(2.0 * 0.5 + 4.0 * 0.5)
