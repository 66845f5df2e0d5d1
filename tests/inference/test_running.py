"""An engine over the weights of a run between its steps: the run goes on to the same bits, and every layout writes the same tokens."""

from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from zero_grid import config_of, shape_of

from megatrain.evaluation.scoring import on_replicas
from megatrain.inference.engine import EngineSettings
from megatrain.inference.replicas import gathered, share
from megatrain.inference.requests import Request, Sampling
from megatrain.inference.running import Told, dealing, engine_of_run, room_for
from megatrain.kernels import compiled as kernels
from megatrain.models.layers import Build
from megatrain.parallel.mesh import ParallelContext
from megatrain.testing import simulate
from megatrain.testing.trace import trace_run

STEPS = 2
POINTS = {
    "dp2-zero0": (0, ("1f1b", 1, 1), (1, False), 2, 3, True, "none", 500),
    "tp2-sp-dp2-zero1": (1, ("1f1b", 1, 1), (2, True), 2, 3, False, "selective", 500),
    "pp2-dp2-zero3": (3, ("1f1b", 1, 2), (1, False), 2, 3, True, "full", 500),
    "tp2-sp-interleaved-dp2-zero3": (3, ("interleaved", 2, 2), (2, True), 2, 1, False, "none", 10**6),
    "zb_v": (2, ("zb_v", 2, 2), (1, False), 2, 1, True, "none", 500),
}
"""Stage, schedule, (tp, sequence parallel), dp, micro-batches, tied, recompute, bucket size: as in zero_grid."""
REQUESTS = [
    Request((1, 2, 3), 5, Sampling(greedy=True)),
    Request((4,), 3, Sampling(greedy=True)),
    Request((5, 6, 7, 8, 9), 4, Sampling(temperature=0.7), seed=3),
    Request((1, 2, 3, 4), 0, score_from=1, top=2),
]


def asked(run):
    """(tokens and log-probabilities) of all requests, after the replicas have shared them."""
    ctx = dealing(run)
    with engine_of_run(run, None, [8] * len(REQUESTS)) as engine:
        answers = engine.run(share(REQUESTS, ctx))
        engine.settle()
    assert all(chunk.training for chunk in run.chunks)
    return gathered([[[of.token, of.logprob] for of in (*a.tokens, *a.prompt)] for a in answers], ctx)


def traced(ctx, config, asks):
    """The trace of a run, and what it has answered after each step, if it was asked."""
    said = []

    def between(step, run):
        if asks:
            said.append(asked(run))
        return run

    return trace_run(ctx, config, STEPS, between=between), said


@cache
def alone(tied):
    """What one process answers."""
    config = config_of((0, ("1f1b", 1, 1), (1, False), 1, 3, tied, "none", 10**6))
    return traced(ParallelContext.single(), config, True)[1]


@pytest.mark.parametrize("name", POINTS)
def test_a_run_goes_on_to_the_same_bits_and_every_layout_writes_the_same(name):
    config, shape = config_of(POINTS[name]), shape_of(POINTS[name])
    plain, asking = (simulate(shape, traced, config, asks) for asks in (False, True))
    for (before, _), (after, said) in zip(plain, asking, strict=True):
        assert (after.losses, after.grad_norms) == (before.losses, before.grad_norms)
        for part, other in ((before.weights, after.weights), *zip(before.states.values(), after.states.values(), strict=True)):
            assert all(torch.equal(part[key], other[key]) for key in part)
        for step, expected in zip(said, alone(POINTS[name][5]), strict=True):
            assert [[token for token, _ in one] for one in step] == [[token for token, _ in one] for one in expected]
            logs, known = ([log for one in of for _, log in one] for of in (step, expected))
            assert logs == pytest.approx(known, abs=1e-6)


@pytest.mark.parametrize("name", ["tp2-sp-dp2-zero1", "pp2-dp2-zero3"])
@pytest.mark.parametrize("at", [2, 6])
def test_where_one_rank_is_told_to_stop_all_leave_at_the_same_step(name, at):
    """After six steps the first of two replicas has done its part, one token, and waits for the other one."""
    config = config_of(POINTS[name])

    def told_later(ctx):
        looks = []

        def asks(step, run):
            def told():
                looks.append(step)
                return ctx.world.rank == ctx.world.size - 1 and len(looks) > at

            with engine_of_run(run, None, [8] * 4, told) as engine, pytest.raises(Told):
                work = partial(answered, engine)
                on_replicas(engine, [1, 8], lambda _: 1, work, dealing(run))
            assert run.chunks[0].training
            return run

        trace_run(ctx, config, 1, between=asks)
        return len(looks)

    assert set(simulate(shape_of(POINTS[name]), told_later)) == {at + 1}


def answered(engine, counts):
    """Texts of so many tokens, one request after the other."""
    return [len(engine.run([Request((1,), count, Sampling(greedy=True))])[0].tokens) for count in counts]


def test_keys_and_values_take_no_more_than_a_micro_batch_but_for_one_long_request():
    config = config_of(POINTS["dp2-zero0"])  # micro-batches of 2 x 8 tokens, and 8 positions
    run = SimpleNamespace(
        config=config, chunks=[SimpleNamespace(build=Build(None, None, torch.device("cpu"), config.model, 29, 0))]
    )
    longer = replace(run.chunks[0].build, config=replace(config.model, position="none", max_positions=100))
    assert room_for(run, [3, 3], block=2) == EngineSettings(2, 16, most_running=16, cache_tokens=8)
    assert room_for(run, [3] * 9, block=2).cache_tokens == 16
    assert room_for(SimpleNamespace(config=config, chunks=[SimpleNamespace(build=longer)]), [33, 5], block=2).cache_tokens == 34


@pytest.mark.compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore::DeprecationWarning")
def test_nothing_is_compiled_for_an_answer(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # graphs alone, which g++ need not build
    kernels.compiled.cache_clear()
    config = config_of((0, ("1f1b", 1, 1), (1, False), 1, 3, False, "none", 500), "fp32")
    config = replace(config, train=replace(config.train, compile="block"))
    compiled = []

    def asks(step, run):
        if step == 1:
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            asked(run)
            compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
        return run

    plain, asking = (trace_run(ParallelContext.single(), config, 3, between=of) for of in (None, asks))
    kernels.compiled.cache_clear()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiled == [0] and asking.losses == plain.losses
