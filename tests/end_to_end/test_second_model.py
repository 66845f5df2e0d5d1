"""A second model on the same context, forward only: its outputs are those of one process, and the trained model's step does not notice."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from megatrain.assembly import assemble, build_of, layer_pieces
from megatrain.config.load import from_dict
from megatrain.data.loader import Loader
from megatrain.models.batch import Loss, NextToken
from megatrain.models.gpt import build_gpt
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.testing import simulate
from megatrain.testing.trace import RandomSamples
from megatrain.training import Model, forward, to_micro_batches, train_step

V, S, STEPS = 61, 16, 3
SHAPE = MeshShape(tp=2, pp=2)


class EightSamples(RandomSamples):
    """The same global batch again and again."""

    def sample(self, n):
        return super().sample(n % 8)


def config_of(ctx, schedule):
    return from_dict(
        {
            "model": {"num_layers": 4, "hidden_size": 16, "num_attention_heads": 4, "seq_length": S, "vocab_size": V},
            "data": {"train": "random"},
            "optim": {"lr": 1e-2, "warmup_steps": 1},
            "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp64"},
            "parallel": {
                "tensor_parallel_size": ctx.tp.size,
                "sequence_parallel": ctx.tp.size > 1,
                "pipeline_parallel_size": ctx.pp.size,
                "virtual_pipeline_size": 2 if schedule in ("interleaved", "zb_v") else 1,
                "schedule": schedule,
            },
        }
    )


class LogProbabilities(NextToken):
    """Puts out the log-probability of every label, [s, b]."""

    statistics = ()

    def __call__(self, head, hidden, batch):
        losses, _ = head.cross_entropy(hidden, batch.labels)
        return Loss(losses.new_zeros(()), output=-losses)


@dataclass(frozen=True)
class Preference(LogProbabilities):
    """Direct preference optimisation (arXiv:2305.18290, equation 7): sequence 0 of a micro-batch is preferred to sequence 1."""

    beta: float = 0.5
    statistics: tuple = field(default=("correct", "margin"))

    def weight(self, batch):
        return torch.ones((), dtype=torch.float64)

    def __call__(self, head, hidden, batch):
        losses, _ = head.cross_entropy(hidden, batch.labels)
        preferred, other = (-losses - batch.extra).sum(0)
        margin = self.beta * (preferred - other)
        return Loss(-logsigmoid(margin), {"correct": margin > 0, "margin": margin})


def frozen(config, ctx):
    """A model with the weights that training begins with."""
    chunks = build_gpt(build_of(config, V, ctx), *layer_pieces(config, V), ctx.pp.rank)
    return Model(config, ctx, [chunk.eval() for chunk in chunks], LogProbabilities())


def outputs(ctx, schedule):
    """Log-probabilities [s, b] of each of four micro-batches, and the sums that go with them."""
    config = config_of(ctx, schedule)
    reference = frozen(config, ctx)
    with Loader(RandomSamples(V, S), 8, 2, 0, 1) as loader:
        executed = forward(reference, to_micro_batches(loader.build(0), reference))
    return executed.outputs, executed.sums.tolist()


def trained(ctx, schedule, objective, second):
    """(reports, weights) of a few steps; with `second`, a frozen model is run before each."""
    config = config_of(ctx, schedule)
    reference = frozen(config, ctx)

    def prepare(micro_batches):
        executed = forward(reference, micro_batches)
        return [replace(m, extra=output) for m, output in zip(micro_batches, executed.outputs, strict=True)]

    with Loader(EightSamples(V, S), 8, 2, 0, 1) as loader:
        run = assemble(config, ctx, loader, V, objective=objective)
        run.prepare = prepare if second else run.prepare
        reports = [train_step(run) for _ in range(STEPS)]
    return reports, run.flat.weights.clone()


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_its_outputs_are_those_of_one_process(schedule):
    (alone,) = simulate(MeshShape(), outputs, schedule)
    assert [x.shape for x in alone[0]] == [(S, 2)] * 4 and alone[1] == [0.0]
    found = simulate(SHAPE, outputs, schedule)
    last = (0, 1) if schedule == "zb_v" else (2, 3)
    for rank, (each, sums) in enumerate(found):
        assert sums == [0.0]
        if rank in last:
            torch.testing.assert_close(each, alone[0], rtol=1e-12, atol=1e-12)
        else:
            assert each == [None] * 4


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_a_step_does_not_notice_it(schedule):
    with_it, without = (simulate(SHAPE, trained, schedule, NextToken(), second) for second in (True, False))
    for (reports, weights), (others, same) in zip(with_it, without, strict=True):
        assert reports == others and torch.equal(weights, same)


def test_an_objective_reads_its_outputs():
    """While both models are the same, every margin is 0 and the loss log 2; a step makes the margins grow, on all layouts alike."""
    alone, _ = trained(ParallelContext.single(), "1f1b", Preference(), second=True)
    assert alone[0].loss == pytest.approx(math.log(2), rel=1e-12)
    assert alone[0].statistics["margin"] == pytest.approx(0.0, abs=1e-12)
    assert alone[-1].loss < 0.6 and alone[-1].statistics["margin"] > 0.1 and alone[-1].accuracy == 1.0
    for reports, _ in simulate(SHAPE, trained, "zb_v", Preference(), True):
        assert [r.loss for r in reports] == pytest.approx([r.loss for r in alone], rel=1e-9)
        assert reports[-1].statistics == pytest.approx(alone[-1].statistics, rel=1e-9)


def test_a_statistic_that_an_objective_does_not_declare_is_told():
    with pytest.raises(
        ValueError, match=r"^Preference\.statistics is \('correct',\), and 'margin' of shape \[\] cannot be summed"
    ):
        trained(ParallelContext.single(), "1f1b", Preference(statistics=("correct",)), second=True)
