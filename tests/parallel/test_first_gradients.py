"""What comes first writes a weight gradient: buffers are neither cleared nor read before, and what nobody writes is zero."""

from dataclasses import replace

import pytest
import torch
from zero_grid import config_of, shape_of

from megatrain.parallel.flat import Unit
from megatrain.parallel.mesh import ParallelContext, Rows
from megatrain.parallel.param import Parameter, ParamSpec, Place, add_bias_gradient, add_weight_gradient, claim, make_parameters
from megatrain.parallel.zero import FlatParameters
from megatrain.testing import simulate
from megatrain.testing.trace import trace_run

SINGLE = ParallelContext.single()


def poison(monkeypatch):
    """Every buffer that is to hold gradients holds NaN before it is told to forget them."""
    forget = FlatParameters._forget

    def poisoned(flat, local, grads):
        grads.fill_(torch.nan)
        forget(flat, local, grads)

    monkeypatch.setattr(FlatParameters, "_forget", poisoned)


CASES = [
    (0, ("1f1b", 1, 1), True, "bf16"),
    (1, ("1f1b", 1, 2), True, "fp32"),
    (2, ("zb_v", 2, 2), False, "bf16"),
    (3, ("gpipe", 1, 2), True, "fp32"),
]
OTHERS = [(*case, "fp32" if precision == "bf16" else "bf16") for *case, precision in CASES]


@pytest.mark.parametrize(
    ("stage", "schedule", "tied", "precision"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)],
)
def test_what_the_buffers_held_before_is_never_read(monkeypatch, stage, schedule, tied, precision):
    point = (stage, schedule, (2, True), 2, 3, tied, "none", 500)

    def traces():
        config = config_of(point, precision)
        config = replace(config, train=replace(config.train, loss_chunk=7 if stage == 2 else 0))
        return simulate(shape_of(point), trace_run, config, 2)

    clean = traces()
    poison(monkeypatch)
    for before, after in zip(clean, traces(), strict=True):
        assert before.losses == after.losses and before.grad_norms == after.grad_norms
        assert all(torch.equal(before.weights[name], after.weights[name]) for name in before.weights)


def flat_of(monkeypatch, parameters):
    """Forgetful buffers of NaN."""
    poison(monkeypatch)
    flat = FlatParameters([Unit(tuple(parameters))], SINGLE)
    flat.zero_grad()
    return flat


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_first_product_is_written_and_the_second_added(monkeypatch, dtype):
    q, k = make_parameters([ParamSpec("q", (4, 3)), ParamSpec("k", (2, 3))], Place(Rows(SINGLE.tp), dtype, SINGLE.device))
    flat = flat_of(monkeypatch, [q, k])
    assert flat.grads[:18].isnan().all() and (flat.grads[18:] == 0).all(), "nothing is cleared but what is no parameter's"
    dy, x = torch.randn(5, 6).to(dtype), torch.randn(5, 3).to(dtype)
    product = (dy.t() @ x).to(flat.grads.dtype)
    for times in (1, 2):
        assert add_weight_gradient([q, k], dy, x) == [None, None]
        torch.testing.assert_close(torch.cat([q._main_grad, k._main_grad]), times * product)


def test_where_one_of_two_has_a_gradient_already_the_other_begins_with_zero(monkeypatch):
    q, k = make_parameters(
        [ParamSpec("q", (4, 3)), ParamSpec("k", (2, 3))], Place(Rows(SINGLE.tp), torch.float32, SINGLE.device)
    )
    flat_of(monkeypatch, [q, k])
    k.main_grad.add_(1.0)
    dy, x = torch.randn(5, 6), torch.randn(5, 3)
    add_weight_gradient([q, k], dy, x)
    torch.testing.assert_close(torch.cat([q.main_grad, k.main_grad - 1]), dy.t() @ x)


def test_a_bias_that_decays_is_written_too(monkeypatch):
    (bias,) = make_parameters([ParamSpec("b", (6,))], Place(Rows(SINGLE.tp), torch.float32, SINGLE.device))
    flat_of(monkeypatch, [bias])
    for times in (1, 2):
        add_bias_gradient([bias], torch.ones(5, 6))
        assert bias.main_grad.tolist() == [5.0 * times] * 6


def test_what_nobody_gave_a_gradient_has_zeros_when_it_is_reduced(monkeypatch):
    made = [Parameter(torch.ones(3, 5), ParamSpec(name, (3, 5))) for name in ("used", "idle")]
    flat = flat_of(monkeypatch, made)
    (made[0] * 2).sum().backward()
    assert claim(made[1])[1], "the first who claims it"
    made[1].unwritten = True
    flat.reduce()
    assert made[0].main_grad.unique().item() == 2 and made[1].main_grad.unique().item() == 0
    assert flat.grads.isfinite().all()
