"""Ranks agree on who is lowest, and share short texts."""

import torch

from megatrain.parallel.mesh import MeshShape
from megatrain.testing import simulate
from megatrain.transport.consensus import broadcast_text, gather_texts, lowest

CPU = torch.device("cpu")


def test_texts_travel_whole():
    def exchange(ctx):
        mine = "" if ctx.tp.rank == 0 else "place 1 " + "\u00fc" * 50
        return (
            gather_texts(mine, ctx.tp.group, CPU),
            broadcast_text(mine, ctx.tp.group, CPU, 1),
            broadcast_text(mine, ctx.tp.group, CPU),
        )

    texts = ["", "place 1 " + "\u00fc" * 50]
    assert simulate(MeshShape(tp=2, dp=2), exchange) == [(texts, texts[1], "")] * 4


def test_the_lowest_place_for_which_it_is_true():
    assert simulate(4, lambda ctx: lowest(ctx.dp.rank in (2, 3), ctx.dp.group, CPU)) == [2] * 4
    assert simulate(4, lambda ctx: lowest(False, ctx.dp.group, CPU)) == [None] * 4


def test_one_rank_alone():
    assert gather_texts("alone", None, CPU) == ["alone"] and broadcast_text("alone", None, CPU) == "alone"
    assert lowest(True, None, CPU) == 0 and lowest(False, None, CPU) is None
