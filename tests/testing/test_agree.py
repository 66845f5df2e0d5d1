"""`agree` passes what is rounding, and catches and names everything else."""

import pickle
from dataclasses import replace

import pytest
import torch

from megatrain.config.schema import Config, ModelConfig, ParallelConfig, TrainConfig
from megatrain.parallel.mesh import ParallelContext
from megatrain.testing import Disagreement, Trace, agree, agree_in_bf16
from megatrain.testing.trace import trace_run


def trace(dtype="fp64"):
    generator = torch.Generator().manual_seed(0)
    kind = torch.float64 if dtype == "fp64" else torch.float32

    def tensors(scale):
        return {name: scale * torch.randn(3, 4, generator=generator, dtype=kind) for name in ("first", "second", "bias")}

    states = {"exp_avg": tensors(0.1), "exp_avg_sq": tensors(0.01)}
    return Trace([2.0, 1.5, 1.25], [3.0, 2.0, 1.0], tensors(0.1), tensors(1.0), states, 1e-3, dtype)


def changed(tensors, name, amount, place=(1, 2)):
    tensor = tensors[name].clone()
    tensor[place] += amount
    return {**tensors, name: tensor}


def with_step(values, step, relative):
    return [v * (1 + relative) if i == step else v for i, v in enumerate(values)]


def test_equal_runs_agree_and_the_deviations_are_returned():
    assert agree(trace(), trace()) == {"loss": 0.0, "grad_norm": 0.0, "gradient": 0.0, "weight": 0.0, "state": 0.0}


@pytest.mark.parametrize(
    ("dtype", "optimizer", "step", "update"), [("fp64", "adamw", 1e-12, 1e-8), ("fp32", "sgd", 2e-5, 2e-5)]
)
def test_what_is_within_tolerance_agrees_and_what_is_not_is_named(dtype, optimizer, step, update):
    a = trace(dtype)
    for factor, caught in ((0.5, False), (2.0, True)):
        largest = a.gradients["second"].abs().max().item()
        heaviest = max(a.weights["second"].abs().max().item(), 1e-3)
        state = max(a.states["exp_avg"]["second"].abs().max().item(), 1e-3)
        rms = (sum(g.double().square().sum() for g in a.gradients.values()) / 36).sqrt().item()
        moment = {**a.states, "exp_avg": changed(a.states["exp_avg"], "second", factor * update * state)}
        cases = {
            r"step 1, loss": replace(a, losses=with_step(a.losses, 1, factor * step)),
            r"step 2, grad_norm": replace(a, grad_norms=with_step(a.grad_norms, 2, factor * step)),
            r"gradient of step 0: second\[1, 2\]": replace(
                a, gradients=changed(a.gradients, "second", factor * step * max(largest, rms))
            ),
            r"weight after step 2: second\[1, 2\]": replace(
                a, weights=changed(a.weights, "second", factor * update * heaviest)
            ),
            r"state \(exp_avg\) after step 2: second\[1, 2\]": replace(a, states=moment),
        }
        for message, b in cases.items():
            if caught:
                with pytest.raises(Disagreement, match=message):
                    agree(a, b, optimizer=optimizer)
            else:
                assert max(agree(a, b, optimizer=optimizer).values()) > 0


def test_both_values_and_the_others_that_deviate_are_shown():
    a = trace()
    b = replace(a, gradients={name: g.clone() for name, g in a.gradients.items()})
    b.gradients["first"][0, 1] = 7.5
    b.gradients["bias"][2, 3] = 8.5
    with pytest.raises(Disagreement) as caught:
        agree(a, b)
    message = str(caught.value)
    assert "first[0, 1] is 7.5" in message
    assert repr(a.gradients["first"][0, 1].item()) in message
    assert "2 of 3 tensors deviate; so do bias" in message


def test_the_first_step_that_differs_is_named_and_a_gradient_before_its_norm():
    a = trace()
    late = replace(a, losses=with_step(a.losses, 1, 1e-3), weights=changed(a.weights, "first", 1.0))
    with pytest.raises(Disagreement, match="step 1, loss"):
        agree(a, late)
    early = replace(late, gradients=changed(a.gradients, "bias", 1.0), grad_norms=with_step(a.grad_norms, 0, 0.1))
    with pytest.raises(Disagreement, match="gradient of step 0: bias"):
        agree(a, early)


def test_a_tiny_gradient_is_measured_by_the_size_of_all():
    a = trace()
    a = replace(a, gradients={**a.gradients, "bias": torch.full((3, 4), 1e-20, dtype=torch.float64)})
    agree(a, replace(a, gradients=changed(a.gradients, "bias", 1e-15)))
    with pytest.raises(Disagreement, match="bias"):
        agree(a, replace(a, gradients=changed(a.gradients, "bias", 1e-12)))


def test_a_tiny_weight_is_measured_by_the_learning_rate():
    a = trace()
    a = replace(a, weights={**a.weights, "bias": torch.zeros(3, 4, dtype=torch.float64)})
    agree(a, replace(a, weights=changed(a.weights, "bias", 0.5e-11)))
    with pytest.raises(Disagreement, match="bias"):
        agree(a, replace(a, weights=changed(a.weights, "bias", 2e-11)))


@pytest.mark.parametrize("mine", [float("nan"), 1.5])
def test_a_reference_that_diverges_is_told_as_such(mine):
    a = trace()
    reference, other = (replace(a, losses=[2.0, loss, loss]) for loss in (float("nan"), mine))
    with pytest.raises(
        Disagreement, match=rf"step 1, loss: {mine}, and nan in the reference itself: .* a config that diverges"
    ):
        agree(reference, other)


@pytest.mark.parametrize("kind", ["losses", "grad_norms", "gradients", "weights"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_disagrees(kind, value):
    a = trace()
    b = {
        "losses": replace(a, losses=[2.0, value, 1.25]),
        "grad_norms": replace(a, grad_norms=[value, 2.0, 1.0]),
        "gradients": replace(a, gradients=changed(a.gradients, "second", value)),
        "weights": replace(a, weights=changed(a.weights, "second", value)),
    }[kind]
    with pytest.raises(Disagreement):
        agree(a, b)


def test_adam_weights_are_not_compared_in_float32():
    a = trace("fp32")
    b = replace(a, weights=changed(a.weights, "first", 1.0))
    for optimizer in ("adamw", "adam"):
        assert "weight" not in agree(a, b, optimizer=optimizer)
    with pytest.raises(Disagreement):
        agree(a, b, optimizer="sgd")


def test_shapes_names_and_steps_must_match():
    a = trace()
    cases = {
        "only one of the two runs has second": replace(a, weights={k: v for k, v in a.weights.items() if k != "second"}),
        r"first is \[12\], but \[3, 4\]": replace(a, gradients={**a.gradients, "first": a.gradients["first"].flatten()}),
        "reference has 3 steps, the other 2": replace(a, losses=a.losses[:2]),
        "optimizer states": replace(a, states={"momentum": a.states["exp_avg"]}),
    }
    for message, b in cases.items():
        with pytest.raises(Disagreement, match=message):
            agree(a, b)
    with pytest.raises(ValueError, match="a fp64 run cannot be compared with a fp32 run"):
        agree(a, trace("fp32"))
    with pytest.raises(ValueError, match="bf16 has no fixed tolerance"):
        agree(replace(a, dtype="bf16"), replace(a, dtype="bf16"))


def test_a_control_widens_the_limits_of_what_it_moves_alone():
    a = trace()
    second = a.gradients["second"].abs().max().item()
    control = replace(a, gradients=changed(a.gradients, "second", 1e-11 * second), losses=with_step(a.losses, 1, 1e-11))
    far = lambda factor: replace(a, gradients=changed(a.gradients, "second", factor * 1e-11 * second))  # noqa: E731
    assert agree(a, far(31), control=[a, control])["gradient"] == pytest.approx(3.1e-10, rel=1e-3)
    with pytest.raises(
        Disagreement, match=r"deviation 3\.3e-10 > 3\.2e-10, 32 times what a change of the weights in their last"
    ):
        agree(a, far(33), control=[a, control])
    with pytest.raises(Disagreement, match=r"gradient of step 0: first.* > 1e-12\."):
        agree(a, replace(a, gradients=changed(a.gradients, "first", 1e-11)), control=[control])
    for step in (1, 2):  # errors grow: what one step is allowed the next ones are
        agree(a, replace(a, losses=with_step(a.losses, step, 3e-10)), control=[control])
    with pytest.raises(Disagreement, match=r"step 0, loss: .* > 1e-12$"):
        agree(a, replace(a, losses=with_step(a.losses, 0, 1e-11)), control=[control])


def test_a_control_that_is_not_finite_excuses_nothing():
    a = trace()
    control = replace(a, losses=[2.0, float("nan"), float("inf")], weights=changed(a.weights, "first", float("nan")))
    for b in (replace(a, losses=with_step(a.losses, 2, 1e-9)), replace(a, weights=changed(a.weights, "first", 1e-3))):
        with pytest.raises(Disagreement):
            agree(a, b, control=[control])


def test_bfloat16_may_be_twice_as_far_from_float32_as_one_process():
    exact, single = trace("fp32"), replace(trace("fp32"), dtype="bf16", losses=[2.01, 1.5, 1.2])
    agree_in_bf16(exact, single, replace(single, losses=[1.9801, 9.0, 9.0]))
    with pytest.raises(Disagreement, match=r"step 0, losses: 2\.03"):
        agree_in_bf16(exact, single, replace(single, losses=[2.03, 1.5, 1.2]))
    with pytest.raises(Disagreement, match="grad_norms"):
        agree_in_bf16(exact, single, replace(single, grad_norms=[3.001, 2.0, 1.0]))


def test_bfloat16_over_several_seeds_compares_root_mean_squares():
    exact, single = trace("fp32"), replace(trace("fp32"), dtype="bf16", losses=[2.01, 1.5, 1.2])
    lucky, far = replace(single, losses=[2.0, 1.5, 1.2]), replace(single, losses=[2.02, 1.5, 1.2])
    with pytest.raises(Disagreement, match=r"step 0, losses: 2\.02 \(2\.0 in float32, 2\.0 on one process\)"):
        agree_in_bf16(exact, lucky, far)
    agree_in_bf16([exact] * 2, [single, lucky], [lucky, single])
    with pytest.raises(Disagreement, match="losses"):
        agree_in_bf16([exact] * 2, [single, lucky], [far, far])
    with pytest.raises(ValueError, match="zip"):
        agree_in_bf16([exact] * 2, [single] * 2, [single])


def test_a_trace_that_is_sent_takes_the_bytes_of_its_numbers():
    parallel, model = (
        ParallelConfig(),
        ModelConfig(num_layers=4, hidden_size=16, num_attention_heads=2, seq_length=8, vocab_size=64),
    )
    config = Config(
        model=model, parallel=parallel, train=TrainConfig(precision="fp64", global_batch_size=2, micro_batch_size=1)
    )
    sent = trace_run(ParallelContext.single(), config, 1)
    tensors = [*sent.gradients.values(), *sent.weights.values(), *(t for of in sent.states.values() for t in of.values())]
    assert len(tensors) > 100
    numbers = sum(t.numel() * t.element_size() for t in tensors)
    assert len(pickle.dumps(sent)) < numbers + 1000 * len(tensors)
