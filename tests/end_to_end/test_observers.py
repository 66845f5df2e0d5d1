"""What a run's observers are told, and when; how little it takes to look on."""

from contextlib import contextmanager

import torch

from megatrain.config.schema import Config, ModelConfig, ParallelConfig, TrainConfig
from megatrain.parallel.mesh import ParallelContext
from megatrain.testing.trace import trace_run

MODEL = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, seq_length=8, vocab_size=101)
CONFIG = Config(
    model=MODEL,
    train=TrainConfig(global_batch_size=2, micro_batch_size=1, precision="fp32", steps=3),
    parallel=ParallelConfig(device="cpu"),
)


def test_a_step_is_told_in_its_order_and_without_a_trace_in_its_numbers():
    told, norms = [], []

    def prepare(run):
        @contextmanager
        def phase(name):
            told.append(name)
            yield
            told.append(f"end of {name}")

        run.observers.phase = phase
        run.observers.instruction = lambda instruction, start, end: told.append((instruction.kind, start <= end))
        run.observers.before_update.append(lambda run: told.append(f"before update {run.step + 1}"))
        run.observers.before_update.append(lambda run: norms.append(run.flat.trained[0].own_grads.norm().item()))

    seen = trace_run(ParallelContext.single(), CONFIG, 2, prepare=prepare)
    unseen = trace_run(ParallelContext.single(), CONFIG, 2)
    passes = [("forward", True), ("backward", True)] * 2
    steps = [
        ["data", "end of data", *passes, "reduce", "end of reduce", f"before update {step}", "optimizer", "end of optimizer"]
        for step in (1, 2)
    ]
    assert told == steps[0] + steps[1]
    assert len(norms) == 2 and min(norms) > 0
    assert (seen.losses, seen.grad_norms) == (unseen.losses, unseen.grad_norms)
    assert all(torch.equal(weight, unseen.weights[name]) for name, weight in seen.weights.items())
    assert all(torch.equal(gradient, unseen.gradients[name]) for name, gradient in seen.gradients.items())
