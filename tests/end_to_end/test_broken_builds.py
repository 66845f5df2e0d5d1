"""Faults patched into the real code are caught by the agreement tests, with the right tensor or quantity named."""

from dataclasses import replace

import pytest
from against_reference import BASE, OPTIMIZERS, check
from against_reference import config_of as reference_config
from layout_grid import STEPS, compare, config_of, shape_of

from megatrain.models import layers
from megatrain.parallel import vocabulary, zero
from megatrain.testing import Disagreement, simulate
from megatrain.testing.trace import trace_run

SETTING = (True, 101, 4, 0.1, "fp64")


def run(layout, **arguments):
    compare(simulate(shape_of(layout, SETTING), trace_run, config_of(layout, SETTING), STEPS, **arguments), layout, SETTING)


def test_a_missing_reduction_of_norm_gradients_under_sequence_parallelism(monkeypatch):
    monkeypatch.setattr(zero, "_sum_partial", lambda segments, ctx: None)
    with pytest.raises(Disagreement, match=r"embedding\.positions|norm\.(weight|bias)|\.bias|grad"):
        run((2, True, 1, 4))


def test_a_tied_gradient_counted_twice(monkeypatch):
    real = vocabulary.add_matmul

    def twice_for_the_head(out, a, b, first):
        real(out, a, b, first)
        if out.shape == (BASE.vocab_size, BASE.hidden_size):
            real(out, a, b)

    monkeypatch.setattr(vocabulary, "add_matmul", twice_for_the_head)
    with pytest.raises(Disagreement, match=r"embedding\.tokens|grad"):
        check(reference_config(BASE, OPTIMIZERS[0], "fp64"))


def test_clipping_skipped_on_one_rank():
    def skip_on_rank_1(run):
        if run.ctx.tp.rank == 1:
            run.config = replace(run.config, optim=replace(run.config.optim, name="adamw", clip_grad=0.0))

    layout = (2, False, 1, 4)
    sgd = (True, 101, 4, 0.1, "fp32")
    traces = simulate(shape_of(layout, sgd), lambda ctx: trace_run(ctx, config_of(layout, sgd), STEPS, prepare=skip_on_rank_1))
    with pytest.raises(Disagreement):
        compare(traces, layout, sgd)


def test_a_loss_divided_by_the_weight_of_one_replica(monkeypatch):
    monkeypatch.setattr("megatrain.training.global_weights", local_weight)
    with pytest.raises(Disagreement, match="loss"):
        run((1, False, 2, 4))


def local_weight(run, micro_batches):
    return sum(run.objective.weight(m) for m in micro_batches)


def test_queries_and_keys_swapped(monkeypatch):
    real = layers.attention
    monkeypatch.setattr(layers, "attention", lambda q, k, v, variant: real(k, q, v, variant))
    with pytest.raises(Disagreement):
        check(reference_config(BASE, OPTIMIZERS[0], "fp64"))
