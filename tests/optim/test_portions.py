"""A rule of its own for a part of the model: torch's own optimizers with parameter groups, any ZeRO stage, saved and resumed."""

from dataclasses import replace

import pytest
import torch

from megatrain.checkpoint.load import load
from megatrain.checkpoint.manifest import read_manifest
from megatrain.checkpoint.save import Contents, save
from megatrain.config.schema import OptimConfig
from megatrain.optim.optimizer import RULES, Optimizer, Rule
from megatrain.optim.portions import portions
from megatrain.parallel.flat import Unit
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.parallel.param import Parameter, ParamSpec
from megatrain.parallel.zero import FlatParameters
from megatrain.testing import simulate

SHAPES = {
    "embedding.tokens": ((20, 12), "embedding"),
    "embedding.bias": ((12,), "embedding"),
    "up": ((12, 24), "mlp"),
    "up_bias": ((24,), "mlp"),
    "head": ((12, 20), "head"),
}
OPTIM = OptimConfig(weight_decay=0.1, betas=(0.8, 0.9), momentum=0.7)
ONE, NO = torch.ones((), dtype=torch.float64), torch.zeros(())


def number(name, step, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(name) + 100 * step), dtype=torch.float64)


def made(ctx, stage, rules, names=SHAPES):
    parameters = [
        Parameter(number(n, 0, shape), ParamSpec(n, shape, decay=len(shape) > 1, part=part))
        for n, (shape, part) in SHAPES.items()
        if n in names
    ]
    units = [Unit((p,)) for p in parameters]
    return FlatParameters(units, ctx, stage=stage, bucket_size=500, rules=rules)


def step(flat, optimizer, number_of):
    """One update with gradients that the replicas sum."""
    flat.zero_grad()
    for parameter in flat.parameters:
        parameter.accumulated.copy_(number(parameter.spec.name, number_of, tuple(parameter.shape)) / flat.ctx.dp.size)
    flat.reduce()
    optimizer.step(1e-2, ONE, NO)
    flat.settle()


def trained(ctx, stage, rules, folder=None, resumed=None):
    """Whole tensors after two steps, or from a checkpoint after the first; with `folder` it is written there."""
    flat = made(ctx, stage, rules)
    optimizer = Optimizer(flat, OPTIM)
    if resumed is not None:
        load(resumed, portions(optimizer), ctx)
        optimizer.refresh()
        optimizer.updates.fill_(1)
        flat.settle()
    for number_of in (1, 2)[resumed is not None :]:
        step(flat, optimizer, number_of)
        if folder is not None and number_of == 1:
            save(folder, Contents(1, {}, ""), portions(optimizer), ctx)
    return {kind: {n: t.clone() for n, (_, t) in of.items()} for kind, of in optimizer.tensors().items()}


def in_torch(sgd):
    """Weights after two steps of AdamW, and of SGD for those named."""
    weights = {n: torch.nn.Parameter(number(n, 0, shape)) for n, (shape, _) in SHAPES.items()}
    decay = {n: 0.1 * (len(shape) > 1) for n, (shape, _) in SHAPES.items()}
    groups = [{"params": [w], "weight_decay": decay[n]} for n, w in weights.items() if n not in sgd]
    others = [{"params": [w], "weight_decay": decay[n]} for n, w in weights.items() if n in sgd]
    optimizers = [torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9)), torch.optim.SGD(others, lr=1e-2, momentum=0.7)]
    for number_of in (1, 2):
        for n, w in weights.items():
            w.grad = number(n, number_of, w.shape)
        for optimizer in optimizers:
            optimizer.step()
    return {n: w.detach() for n, w in weights.items()}


EMBEDDINGS = ("embedding.tokens", "embedding.bias")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sgd_for_embeddings_beside_adamw_is_torchs(stage):
    expected = in_torch(EMBEDDINGS)
    for found in simulate(MeshShape(dp=2), trained, stage, {"embedding": "sgd"}):
        assert set(found) == {"weights", "exp_avg", "exp_avg_sq", "momentum"}
        assert set(found["momentum"]) == set(EMBEDDINGS) and set(found["exp_avg"]) == set(SHAPES) - set(EMBEDDINGS)
        for name, weight in expected.items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-12, atol=1e-12)


def test_both_kinds_of_states_go_on_under_another_layout_to_the_bit(tmp_path):
    rules = {"embedding": "sgd"}
    plain = simulate(MeshShape(dp=4), trained, 3, rules, tmp_path)[0]
    path = tmp_path / "step_00000001"
    assert read_manifest(path).kinds == ("weights", "exp_avg", "exp_avg_sq", "momentum")
    again = simulate(MeshShape(dp=2), trained, 1, rules, None, path)[0]
    for kind, tensors in plain.items():
        assert all(torch.equal(again[kind][name], tensor) for name, tensor in tensors.items()), kind


def test_a_stage_of_a_pipeline_without_embeddings_saves_and_loads_beside_one_that_has_them(tmp_path):
    """Both go through the same kinds, though the last stage has no momentum."""

    def on_stage(ctx, fill):
        flat = made(ctx, 1, {"embedding": "sgd"}, EMBEDDINGS if ctx.pp.rank == 0 else ["up", "head"])
        optimizer = Optimizer(flat, OPTIM)
        if fill:
            step(flat, optimizer, 1)
            save(tmp_path, Contents(1, {}, ""), portions(optimizer), ctx)
        else:
            load(tmp_path / "step_00000001", portions(optimizer), ctx)
        return {kind: {n: t.clone() for n, (_, t) in of.items()} for kind, of in optimizer.tensors().items()}

    saved, loaded = (simulate(MeshShape(pp=2, dp=2), on_stage, fill) for fill in (True, False))
    for before, after in zip(saved, loaded, strict=True):
        for kind in ("exp_avg", "momentum"):
            assert before[kind].keys() == after[kind].keys()
            assert all(torch.equal(after[kind][name], state) for name, state in before[kind].items())
    assert saved[0]["momentum"].keys() == set(EMBEDDINGS) and not saved[-1]["momentum"]


def test_a_rule_sees_its_buckets_parameters_with_their_shapes():
    """Gradients divided by the norm of their row: of matrices alone, in a rule made here."""

    def by_rows(update, _decay, weights, grads, *, ranges):
        for parameter, first, at, length in ranges:
            assert (first, length) == (0, parameter.numel())
            rows = grads[at : at + length].view(parameter.shape)
            weights[at : at + length].view(parameter.shape).sub_(rows / rows.norm(dim=-1, keepdim=True), alpha=update.lr)

    flat = made(ParallelContext.single(), 0, {"mlp": "rows"})
    optimizer = Optimizer(flat, OPTIM, rules={**RULES, "rows": Rule((), by_rows, elementwise=False)})
    step(flat, optimizer, 1)
    found = {p.spec.name: p.detach() for p in flat.parameters}
    for name, (shape, part) in SHAPES.items():
        if part == "mlp":
            gradient = number(name, 1, shape)
            expected = number(name, 0, shape) - 1e-2 * gradient / gradient.norm(dim=-1, keepdim=True)
            torch.testing.assert_close(found[name], expected, rtol=1e-14, atol=1e-14)
    others = made(ParallelContext.single(), 0, {})
    step(others, Optimizer(others, OPTIM), 1)
    assert all(torch.equal(p, found[p.spec.name]) for p in others.parameters if p.spec.part != "mlp")
    assert {kind: set(of) for kind, of in optimizer.tensors().items()}["exp_avg"] == {
        n for n, (_, p) in SHAPES.items() if p != "mlp"
    }


@pytest.mark.parametrize("rules", [{"embeding": "sgd"}, {"embedding": "sdg"}])
def test_a_part_or_a_rule_that_there_is_not_is_named(rules):
    ((part, name),) = rules.items()
    parts = "embedding, attention, mlp, norm, head, other"
    with pytest.raises(ValueError, match=rf"rules {part}={name}: parts are {parts}; rules are adamw, adam, sgd"):
        Optimizer(made(ParallelContext.single(), 0, rules), OPTIM)


@pytest.mark.parametrize("rules", [{}, {"embedding": "sgd"}, {"embedding": "sgd", "head": "adam"}])
def test_without_a_rule_of_its_own_no_bucket_is_added(rules):
    """Norms and biases of a chunk share one bucket, but for those of parts with another rule."""
    flat = made(ParallelContext.single(), 0, rules)
    rule = lambda p: rules.get(p.spec.part)  # noqa: E731
    assert all(len({rule(p) for p in local.bucket.parameters}) == 1 for local in flat.buckets)
    biases = [sorted(p.spec.name for p in b.bucket.parameters) for b in flat.buckets if not b.bucket.decay]
    assert sorted(biases) == ([["embedding.bias", "up_bias"]] if not rules else [["embedding.bias"], ["up_bias"]])


def test_adam_beside_adamw_takes_its_weight_decay_into_the_gradient():
    """One step from the same weights: only the parameters of that part are other ones, and equal to a run of Adam."""
    of = {}
    for name, rules, config in (
        ("both", {"head": "adam"}, OPTIM),
        ("adamw", {}, OPTIM),
        ("adam", {}, replace(OPTIM, name="adam")),
    ):
        flat = made(ParallelContext.single(), 0, rules)
        step(flat, Optimizer(flat, config), 1)
        of[name] = {p.spec.name: p.detach().clone() for p in flat.parameters}
    assert torch.equal(of["both"]["head"], of["adam"]["head"]) and not torch.equal(of["both"]["head"], of["adamw"]["head"])
    assert torch.equal(of["both"]["up"], of["adamw"]["up"])
