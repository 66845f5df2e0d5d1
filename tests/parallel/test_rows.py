"""Rows of a layer need not be neighbours: a model whose ranks hold two ends of the sequence each gives the numbers of the whole."""

from dataclasses import replace

import pytest
import torch

from megatrain.config.schema import ModelConfig
from megatrain.models.batch import MicroBatch, NextToken
from megatrain.models.gpt import build_gpt, logical_parameters
from megatrain.models.layers import Build
from megatrain.parallel.mesh import Axis, MeshShape, Rows
from megatrain.testing import simulate

S, B, H, V = 16, 3, 16, 29
CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=H,
    num_attention_heads=4,
    seq_length=S,
    vocab_size=V,
    dropout=0.3,
    init_std=0.3,
    position="learned",
)


class ZigZag(Rows):
    """Rank r of t holds chunks r and 2t - 1 - r of 2t, as context parallelism deals a causal mask's work out."""

    def held(self, length):
        chunk, r = length // (2 * self.tp.size), self.tp.rank
        return tuple(range(c * chunk, (c + 1) * chunk) for c in (r, 2 * self.tp.size - 1 - r))

    def _order(self, length):
        """Places of the rows of all ranks, one rank behind the other."""
        ranks = [replace(self, tp=Axis("tp", self.tp.size, rank)) for rank in range(self.tp.size)]
        return torch.tensor([place for rows in ranks for part in rows.held(length) for place in part])

    def start_enter(self, x):
        whole, handle = super().start_enter(x)
        handle.wait()
        return whole[self._order(len(whole)).argsort()], handle

    def enter(self, x):
        return self.start_enter(x)[0]

    def start_leave(self, partial):
        return super().start_leave(partial[self._order(len(partial))])

    def leave(self, partial):
        return super().leave(partial[self._order(len(partial))])


def batch():
    tokens = torch.randint(V, (S, B), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(S)[:, None].expand(S, B)
    return MicroBatch(tokens, tokens.roll(-1, 0), torch.ones(S, B), positions, torch.arange(B), step=3)


def trained(ctx, kind, config, chunk):
    """(losses, summed over the places whose labels count double, and the gradient of every parameter of this rank)."""
    rows = kind(ctx.tp, True)
    made = build_gpt(Build(rows, torch.float64, ctx.device, config, V, 5, loss_chunk=chunk, recompute="selective"))
    weighted = replace(batch(), loss_weights=torch.linspace(0, 2, S)[:, None].expand(S, B))
    hidden = made[0](None, weighted)
    assert len(hidden) == S // ctx.tp.size
    loss = made[0].head(hidden, NextToken(), weighted)
    loss.total.backward()
    return loss.total.item(), loss.statistics["correct"].item(), {p.spec: p.grad for p in logical_parameters(made)}


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("chunk", [0, 7])
def test_a_model_of_rows_that_are_no_neighbours_gives_the_numbers_of_the_whole(position, chunk):
    config = replace(CONFIG, position=position)
    ((loss, correct, whole),) = simulate(MeshShape(), trained, Rows, config, chunk)
    sides = simulate(MeshShape(tp=2), trained, ZigZag, config, chunk)
    for rank, (its_loss, its_correct, gradients) in enumerate(sides):
        assert its_loss == pytest.approx(loss, rel=1e-12) and its_correct == correct
        for spec, gradient in gradients.items():
            expected = next(g for s, g in whole.items() if s.name == spec.name)
            if spec.partial_over:
                gradient = sum(next(g for s, g in of.items() if s.name == spec.name) for _, _, of in sides)  # noqa: PLW2901
            part = spec.slices(2, rank)
            inside = tuple(slice(0, s.stop - s.start) for s in part)
            torch.testing.assert_close(gradient[inside], expected[part], rtol=1e-10, atol=1e-11)


def test_the_rows_of_a_sequence_and_of_a_tensor():
    axes = [Axis("tp", 2, rank) for rank in range(2)]
    assert [Rows(tp).held(8) for tp in axes] == [(range(8),)] * 2
    assert [Rows(tp, True).held(8) for tp in axes] == [(range(4),), (range(4, 8),)]
    assert [ZigZag(tp, True).held(8) for tp in axes] == [(range(2), range(6, 8)), (range(2, 4), range(4, 6))]
    x = torch.arange(8)
    assert [ZigZag(tp, True).of(x).tolist() for tp in axes] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert Rows(axes[1], True).of(x).data_ptr() == x[4:].data_ptr(), "neighbours are a view"
    assert (Rows(axes[0]).partial_over, Rows(axes[0], True).partial_over) == (None, "tp")
