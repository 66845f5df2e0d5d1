"""Evaluation: the mean over the tokens of the held-out text, whatever the layout, and nothing of the run is touched."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from megatrain.assembly import assemble
from megatrain.config.schema import Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from megatrain.data.held_out import HeldOut
from megatrain.data.loader import Loader
from megatrain.evaluate import Interrupted, evaluate
from megatrain.models.batch import MicroBatch
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.testing import simulate
from megatrain.testing.trace import RandomSamples
from megatrain.training import train_step

SEQ, V = 8, 29


class Text(HeldOut):
    """Held-out samples of which the last has 3 labels that count."""

    seq_length = SEQ
    isolate_documents = False

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return self.samples

    def sample(self, n):
        return np.random.default_rng(n).integers(0, V, SEQ + 1), 3 if n == self.samples - 1 else SEQ


def config_of(ctx):
    chunked = {"virtual_pipeline_size": 2, "schedule": "zb_v"} if ctx.pp.size > 1 else {}
    return Config(
        parallel=ParallelConfig(tensor_parallel_size=ctx.tp.size, pipeline_parallel_size=ctx.pp.size, **chunked),
        model=ModelConfig(
            num_layers=4, hidden_size=16, num_attention_heads=4, seq_length=SEQ, vocab_size=V, dropout=0.5, init_std=0.3
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=1),
        train=TrainConfig(steps=4, global_batch_size=4, micro_batch_size=2, precision="fp64"),
    )


def run_of(ctx, text):
    loader = Loader(RandomSamples(V, SEQ), 4, 2, ctx.dp.rank, ctx.dp.size)
    return assemble(config_of(ctx), ctx, loader, V, held_out={"": text} if text else None)


def evaluated(ctx, text, limit=0):
    run = run_of(ctx, text)
    try:
        return evaluate(run, limit)
    finally:
        run.loader.close()


def by_hand(samples):
    """(mean loss, accuracy, tokens) of one sample after the other, each weighed by its labels."""
    run = run_of(ParallelContext.single(), Text(samples))
    losses, right, tokens = 0.0, 0, 0
    model = whole_model(run).eval()
    with torch.no_grad():
        for n in range(samples):
            ids, count = Text(samples).sample(n)
            batch = MicroBatch(*columns(ids), torch.ones(SEQ, 1), torch.arange(SEQ)[:, None], torch.zeros(1, dtype=torch.int64))
            logits = model.head.logits(model(None, batch))[:count, 0]
            labels = torch.from_numpy(ids[1 : count + 1])
            losses += functional.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(-1) == labels).sum())
            tokens += count
    run.loader.close()
    return losses / tokens, right / tokens, tokens


def columns(ids):
    whole = torch.from_numpy(ids)[:, None]
    return whole[:-1], whole[1:]


def whole_model(run):
    return run.chunks[0]


@pytest.mark.parametrize("samples", [1, 4, 6, 9])
@pytest.mark.parametrize(
    "shape", [MeshShape(), MeshShape(dp=2), MeshShape(tp=2), MeshShape(pp=2), MeshShape(tp=2, dp=2, pp=2)], ids=str
)
def test_every_layout_finds_the_mean_over_the_tokens(shape, samples):
    loss, accuracy, tokens = by_hand(samples)
    for result in simulate(shape, evaluated, Text(samples)):
        assert result.tokens == tokens == (samples - 1) * SEQ + 3
        assert result.loss == pytest.approx(loss, rel=1e-12) and result.accuracy == pytest.approx(accuracy)


@pytest.mark.parametrize("shape", [MeshShape(), MeshShape(dp=2), MeshShape(tp=2), MeshShape(pp=2)], ids=str)
def test_where_one_rank_is_told_to_stop_all_leave_at_the_same_batch(shape):
    def told_later(ctx):
        run, asked = run_of(ctx, Text(9)), []
        last = ctx.world.rank == ctx.world.size - 1
        with pytest.raises(Interrupted):
            evaluate(run, stopping=lambda: asked.append(None) is None and last and len(asked) > 1)
        assert run.chunks[0].training
        run.loader.close()
        return len(asked)

    assert set(simulate(shape, told_later)) == {2}


def test_a_limit_counts_global_batches():
    result = evaluated(ParallelContext.single(), Text(9), limit=2)
    assert result.tokens == 8 * SEQ
    assert result != evaluated(ParallelContext.single(), Text(9))


def test_training_goes_on_as_if_nothing_had_been():
    runs = [run_of(ParallelContext.single(), Text(5)) for _ in range(2)]
    reports = []
    for run, evaluates in zip(runs, (True, False), strict=True):
        steps = []
        for _ in range(3):
            steps.append(train_step(run))
            if evaluates:
                evaluate(run)
        reports.append(steps)
        run.loader.close()
    assert reports[0] == reports[1]
    assert torch.equal(runs[0].flat.weights, runs[1].flat.weights)
    assert whole_model(runs[0]).training


def test_nothing_to_evaluate_on_is_an_error_that_names_the_key():
    with pytest.raises(ValueError, match=r"data\.valid is empty"):
        evaluated(ParallelContext.single(), None)
