"""A loss that a middle layer attaches is trained, and reported, as if it were part of the head's, under every layout."""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import nn

from megatrain.assembly import assemble, build_of, check_whole
from megatrain.config.budget import budget_of
from megatrain.config.schema import Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from megatrain.data.loader import Loader
from megatrain.models.auxiliary import attach_loss
from megatrain.models.batch import MicroBatch, NextToken
from megatrain.models.gpt import Block, build_gpt
from megatrain.models.layers import MLP, Attention
from megatrain.parallel.mesh import ParallelContext, Rows
from megatrain.parallel.param import Init, ParamSpec, make_parameters
from megatrain.testing import simulate
from megatrain.testing.agree import agree
from megatrain.testing.trace import mesh_shape, random_source, trace_run
from megatrain.training import Model, forward, to_micro_batches, train_step

EXPERTS, COEFFICIENT, V = 3, 0.7, 61


@dataclass(frozen=True)
class Balanced(NextToken):
    """Next tokens, beside which routers are kept in balance."""

    @property
    def statistics(self):
        return ("correct", "balance")


class Routed(nn.Module):
    """An MLP behind a router: its output times the probability of the first expert; the router's choices are to be in balance."""

    def __init__(self, name, build, attach):
        super().__init__()
        self.mlp, self.rows, self.attach = MLP(f"{name}.mlp", build), build.rows, attach
        spec = ParamSpec(f"{name}.router", (EXPERTS, 32), None, build.rows.partial_over, init=Init("normal", 0.3))
        (self.router,) = make_parameters([spec], build)

    def forward(self, x, batch, remake=None):
        probabilities = (x @ self.router.t()).softmax(-1)  # [rows, b, experts]
        chosen = nn.functional.one_hot(probabilities.detach().argmax(-1), EXPERTS).to(x.dtype).sum(0)
        share = (self.rows.tp.all_reduce(chosen) if self.rows.split else chosen) / len(batch.tokens)
        loss = COEFFICIENT * EXPERTS * (share * probabilities.sum(0)).sum()
        return self.attach(self.mlp(x, batch, remake) * probabilities[..., :1], loss, "balance", batch, self.rows)


def routed(attach=attach_loss):
    """Blocks whose second and third have a router."""

    def block(index, build):
        name = f"layers.{index}"
        mlp = Routed(name, build, attach) if index in (1, 2) else MLP(f"{name}.mlp", build)
        return Block(index, build, Attention(f"{name}.attention", build), mlp)

    return block


def config_of(precision="fp64", recompute="none", **parallel):
    model = ModelConfig(num_layers=4, hidden_size=32, num_attention_heads=4, seq_length=16, vocab_size=V, init_std=0.2)
    train = TrainConfig(steps=3, global_batch_size=8, micro_batch_size=2, precision=precision, recompute=recompute)
    return Config(model=model, parallel=ParallelConfig(**parallel), optim=OptimConfig(lr=1e-2, warmup_steps=2), train=train)


def loader_of(config, ctx):
    samples, compose = random_source(config, V)
    sizes = (budget_of(config).batch_size, config.train.micro_batch_size, ctx.dp.rank, ctx.dp.size)
    return Loader(samples, *sizes, compose=compose)


def traced(ctx, config):
    return trace_run(ctx, config, 3, objective=Balanced(), block=routed())


@cache
def alone():
    return traced(ParallelContext.single(), config_of())


def in_one_sum():
    """Gradients and balance of the first step, from one backward of one sum in plain autograd."""
    config, losses = config_of(), []

    def keep(x, loss, *_):
        losses.append(loss)
        return x

    ctx = ParallelContext.single()
    with loader_of(config, ctx) as loader:
        model = Model(config, ctx, build_gpt(build_of(config, V, ctx), block=routed(keep)), Balanced())
        of = to_micro_batches(loader.batch(0), model)
    weight = sum(model.objective.weight(m) for m in of)
    (chunk,) = model.chunks
    head = sum(chunk.head.cross_entropy(chunk(None, m), m.labels)[0].sum() for m in of)
    parameters = {p.spec.name: p for p in chunk.logical_parameters()}
    gradients = torch.autograd.grad((head + sum(losses)) / weight, list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True)), (sum(losses) / weight).item()


def test_it_is_as_if_both_losses_were_one_sum():
    wanted, _ = in_one_sum()
    found = alone().gradients
    assert wanted.keys() == found.keys() and wanted["layers.1.router"].abs().max() > 1e-3
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-13, msg=name)


LAYOUTS = [
    {"tensor_parallel_size": 2},
    {"tensor_parallel_size": 2, "sequence_parallel": True},
    {"pipeline_parallel_size": 2},
    {"pipeline_parallel_size": 2, "schedule": "zb_h1"},
    {
        "pipeline_parallel_size": 2,
        "schedule": "zb_v",
        "virtual_pipeline_size": 2,
        "tensor_parallel_size": 2,
        "sequence_parallel": True,
    },
    {"zero_stage": 1},
    {"zero_stage": 3, "pipeline_parallel_size": 2},
]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout.values())))
def test_every_layout_trains_it_alike(layout, recompute):
    config = config_of(recompute=recompute, **layout)
    for trace in simulate(mesh_shape(config, 2 if "zero_stage" in layout else 1), traced, config):
        agree(alone(), trace)


def balances(ctx, config):
    with loader_of(config, ctx) as loader:
        run = assemble(config, ctx, loader, V, objective=Balanced(), block=routed())
        evaluated = forward(run, to_micro_batches(loader.batch(0), run))
        return train_step(run).statistics["balance"], float(evaluated.by_name["balance"])


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("layout", [{}, *LAYOUTS], ids=lambda layout: "-".join(map(str, layout.values())) or "one")
def test_its_mean_is_reported_once_for_every_micro_batch(layout, recompute):
    config = config_of(recompute=recompute, **layout)
    (_, wanted) = in_one_sum()
    for trained, evaluated in simulate(mesh_shape(config, 2 if "zero_stage" in layout else 1), balances, config):
        assert trained == pytest.approx(wanted, rel=1e-12)
        assert evaluated == 0


def test_its_gradient_has_the_loss_scale_of_all_others():
    """In float16 powers of two change no digit of what neither under- nor overflows."""
    plain, losses, grads = config_of("fp16"), [], []
    for scale in (64.0, 512.0):
        config = replace(plain, train=replace(plain.train, loss_scale=scale))
        scales = []
        keep = lambda run, into=scales: into.append(float(run.loss_scale.scale))  # noqa: E731
        trace = trace_run(ParallelContext.single(), config, 1, objective=Balanced(), block=routed(), prepare=keep)
        assert scales == [scale]
        losses.append(trace.losses)
        grads.append(trace.gradients["layers.1.router"].double() / scale)
    assert losses[0] == losses[1]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(grads[0], alone().gradients["layers.1.router"], rtol=0.05, atol=2e-3)


def test_what_cannot_be_attached_is_told():
    x, loss, rows = torch.ones(2, 1, 3), torch.tensor(1.0), Rows(ParallelContext.single().tp)
    tokens = torch.zeros(2, 1, dtype=torch.int64)
    batch = MicroBatch(tokens, tokens, torch.ones(2, 1), tokens, torch.zeros(1), sums={"loss": loss, "correct": loss})
    with pytest.raises(ValueError, match=r"'balance' is no statistic of the objective, which declares correct: add it to its"):
        attach_loss(x, loss, "balance", batch, rows)
    with pytest.raises(ValueError, match=r"'loss' is no statistic"):
        attach_loss(x, loss, "loss", batch, rows)
    with pytest.raises(ValueError, match=r"the loss 'correct' has shape \[1\]; attach a scalar"):
        attach_loss(x, loss[None], "correct", batch, rows)
    with torch.no_grad():
        assert attach_loss(x, loss, "balance", replace(batch, sums={}), rows) is x


def test_a_config_does_not_count_the_parameters_of_other_blocks():
    config, ctx = config_of(), ParallelContext.single()
    with loader_of(config, ctx) as loader:
        run = assemble(config, ctx, loader, V, block=routed(lambda x, *_: x))
        assert sum(p.spec.name.endswith("router") for p in run.chunks[0].logical_parameters()) == 2
        with pytest.raises(
            ValueError, match=r"built 4 layers with [0-9,]+ parameters; model.num_layers=4 with this config makes"
        ):
            check_whole(run.chunks, config, V, ctx)
