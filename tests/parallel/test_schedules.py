"""Schedules are legal programs, and the executor's gradient accumulation is one big batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatrain.parallel.pipeline_parallel import run_schedule
from megatrain.parallel.schedules import Instruction, forward_only, one_f_one_b


@given(stages=st.integers(1, 64), micro_batches=st.integers(1, 200), data=st.data())
def test_1f1b_is_legal(stages, micro_batches, data):
    stage = data.draw(st.integers(0, stages - 1))
    program = one_f_one_b(stage, stages, micro_batches)
    alive, peak, done = set(), 0, []
    for instruction in program:
        if instruction.kind == "forward":
            alive.add(instruction.micro_batch)
            peak = max(peak, len(alive))
        else:
            alive.remove(instruction.micro_batch)
            done.append(instruction.micro_batch)
    assert done == list(range(micro_batches)) and not alive
    assert peak <= min(micro_batches, stages - stage)
    assert [i for i in program if i.last] == [Instruction("backward", micro_batches - 1, last=True)]


def test_one_stage_is_gradient_accumulation():
    kinds = [(i.kind[0], i.micro_batch) for i in one_f_one_b(0, 1, 3)]
    assert kinds == [("f", 0), ("b", 0), ("f", 1), ("b", 1), ("f", 2), ("b", 2)]


@pytest.mark.parametrize(("stage", "stages", "micro_batches"), [(1, 1, 1), (-1, 2, 1), (0, 1, 0)])
def test_nonsense_is_refused(stage, stages, micro_batches):
    with pytest.raises(ValueError, match="no 1F1B schedule"):
        one_f_one_b(stage, stages, micro_batches)


def model_and_batches():
    weight = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    batches = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return weight, batches


def square_loss(hidden, micro_batch):
    return hidden.square().sum(), torch.tensor([float(len(micro_batch))])


def test_accumulation_is_one_big_batch():
    weight, batches = model_and_batches()
    executed = run_schedule(one_f_one_b(0, 1, 3), lambda x, m: m @ weight, square_loss, list(batches), scale=0.25)
    total = (batches.flatten(0, 1) @ weight).square().sum()
    (gradient,) = torch.autograd.grad(total / 4, weight)
    torch.testing.assert_close(weight.grad, gradient)
    assert executed.loss.item() == pytest.approx(total.item()) and executed.statistics.tolist() == [15.0]
    assert not executed.loss.requires_grad


def test_forward_only_keeps_no_graph():
    weight, batches = model_and_batches()
    graphs = []

    def loss(hidden, micro_batch):
        graphs.append(hidden.requires_grad)
        return square_loss(hidden, micro_batch)

    run_schedule(forward_only(3), lambda x, m: m @ weight, loss, list(batches), scale=1.0)
    assert graphs == [False] * 3 and weight.grad is None


def test_an_empty_program_computes_nothing():
    with pytest.raises(ValueError, match="without a forward"):
        run_schedule([], lambda x, m: m, square_loss, [], scale=1.0)
