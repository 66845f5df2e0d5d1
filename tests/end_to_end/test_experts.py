"""Parameters that differ along ep (`average_over="edp"`) train, clip, save and resume as in one process, at every ZeRO stage."""

from functools import cache, partial

import pytest
import torch
from torch import nn

from megatrain.checkpoint.load import load
from megatrain.checkpoint.manifest import read_manifest
from megatrain.checkpoint.save import Contents, save
from megatrain.config.schema import OptimConfig
from megatrain.optim.audit import ReplicaError, audit
from megatrain.optim.optimizer import Optimizer, clip_divisor, local_squared_norm
from megatrain.optim.portions import portions
from megatrain.parallel.flat import Unit
from megatrain.parallel.mesh import MeshShape
from megatrain.parallel.param import Parameter, ParamSpec, Split
from megatrain.parallel.schedules import Schedule
from megatrain.parallel.zero import FlatParameters
from megatrain.testing import simulate

WIDTH, EXPERTS, SAMPLES, STEPS, MICRO_BATCHES = 12, 2, 16, 3, 2
FORMS = ["cut", "named"]
"""The experts are slices of one logical tensor, or a tensor each."""


def start(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample(step, index):
    return start(WIDTH, seed=1000 * step + index)


class Dense(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.weight = Parameter(start(WIDTH, WIDTH, seed=number), ParamSpec(f"{number}.weight", (WIDTH, WIDTH)))
        self.bias = Parameter(start(WIDTH, seed=10 + number), ParamSpec(f"{number}.bias", (WIDTH,), decay=False))

    def forward(self, x, _):
        return torch.tanh(x @ self.weight + self.bias)


class Experts(nn.Module):
    """Those that this rank of ep has; each sample goes through its own."""

    def __init__(self, form, size, rank):
        super().__init__()
        weights, biases = start(EXPERTS, WIDTH, WIDTH, seed=20), start(EXPERTS, WIDTH, seed=21)
        split = Split(0, EXPERTS, "ep")
        self.mine = range(*split.slice(EXPERTS, size, rank))
        shared = {"average_over": "edp", "partial_over": "ep" if split.copies(size) > 1 else None}
        if form == "cut":
            whole = [ParamSpec("experts.weight", tuple(weights.shape), split, **shared)]
            whole += [ParamSpec("experts.bias", tuple(biases.shape), split, decay=False, **shared)]
            made = [Parameter(x[self.mine.start : self.mine.stop].clone(), s) for x, s in zip((weights, biases), whole)]  # noqa: B905
            self.weights, self.biases = [made[0]], [made[1]]
        else:
            self.weights = [
                Parameter(weights[i].clone(), ParamSpec(f"{i}.w", (WIDTH, WIDTH), average_over="edp")) for i in self.mine
            ]
            self.biases = [
                Parameter(biases[i].clone(), ParamSpec(f"{i}.b", (WIDTH,), decay=False, average_over="edp")) for i in self.mine
            ]
        self.all = nn.ParameterList([*self.weights, *self.biases])

    def forward(self, x, experts):
        weights = torch.cat([w.view(-1, WIDTH, WIDTH) for w in self.weights])
        biases = torch.cat([b.view(-1, WIDTH) for b in self.biases])
        here = experts - self.mine.start
        return torch.tanh(torch.einsum("nh,nhk->nk", x, weights[here]) + biases[here])


def samples_of(ctx):
    """This rank's samples of a step, a multiple of MICRO_BATCHES of them: each expert's are dealt out over the ranks that have it."""
    split, found = Split(0, EXPERTS, "ep"), []
    for expert in range(EXPERTS):
        holders = [r for r in range(ctx.dp_cp.size) if expert in range(*split.slice(EXPERTS, ctx.ep.size, r % ctx.ep.size))]
        if ctx.dp_cp.rank in holders:
            found += range(expert, SAMPLES, EXPERTS)[holders.index(ctx.dp_cp.rank) :: len(holders)]
    return found


def made(ctx, form, stage):
    layers = [Dense(0), Experts(form, ctx.ep.size, ctx.ep.rank), Dense(1)]
    units = [Unit(tuple(layer.parameters()), module=layer) for layer in layers]
    flat = FlatParameters(units, ctx, stage=stage, bucket_size=1)
    return layers, flat, Optimizer(flat, OptimConfig(weight_decay=0.1))


def trained(ctx, form, stage, begin=0, end=STEPS, resumed=None, saved=None, break_one=False):
    """(gradient norms, logical name -> what this rank has of it, after `end` steps)."""
    layers, flat, optimizer = made(ctx, form, stage)
    if resumed is not None:
        load(resumed, portions(optimizer), ctx)
        optimizer.refresh()
        optimizer.updates.fill_(begin)
    norms, mine = [], samples_of(ctx)
    for step in range(begin, end):
        flat.zero_grad()
        program = Schedule("1f1b", 1, 1, MICRO_BATCHES).program(0)
        flat.plan(program)
        for instruction in program:
            with flat.during(instruction, None):
                if instruction.kind == "forward":
                    of = mine[instruction.micro_batch :: MICRO_BATCHES]
                    x = torch.stack([sample(step, i) for i in of])
                    for layer in layers:
                        x = layer(x, torch.tensor([i % EXPERTS for i in of]))
                else:
                    (x.square().sum() / SAMPLES).backward()
        flat.reduce()
        norms.append(ctx.world.all_reduce(local_squared_norm(flat, ctx)).sqrt())
        optimizer.step(0.05, clip_divisor(norms[-1], 0.5), torch.zeros(()))
        flat.settle()
        if break_one and ctx.world.rank == 3:
            next(b for b in flat.trained if b.bucket.spec.average_over == "edp").own_weights[0] += 1
        audit(flat, optimizer, ctx)
    if saved is not None:
        save(saved, Contents(end, {}, ""), portions(optimizer), ctx)
    return [float(n) for n in norms], {
        n: (s.slices(ctx.ep.size, ctx.ep.rank), t.clone()) for n, (s, t) in optimizer.tensors()["weights"].items()
    }


@cache
def reference(form):
    """The same mathematics in plain PyTorch, in one process: (gradient norms, weights)."""
    layers = [Dense(0), Experts(form, 1, 0), Dense(1)]
    parameters = [p for layer in layers for p in layer.parameters()]
    plain = {p: nn.Parameter(p.detach().clone()) for p in parameters}
    groups = [{"params": [plain[p] for p in parameters if p.spec.decay == d], "weight_decay": 0.1 * d} for d in (True, False)]
    optimizer, norms = torch.optim.AdamW(groups, lr=0.05, betas=OptimConfig().betas, eps=OptimConfig().eps), []
    experts = torch.tensor([i % EXPERTS for i in range(SAMPLES)])
    for step in range(STEPS):
        optimizer.zero_grad()
        x = torch.stack([sample(step, i) for i in range(SAMPLES)])
        for layer in layers:
            for p in layer.parameters():
                p.data = plain[p].data
                p.grad = None
            x = layer(x, experts)
        (x.square().sum() / SAMPLES).backward()
        for p in parameters:
            plain[p].grad = p.grad
        norms.append(float(nn.utils.clip_grad_norm_(list(plain.values()), 0.5)))
        optimizer.step()
    return norms, {p.spec.name: plain[p].detach() for p in parameters}


def require(results, form, since=0):
    norms, weights = reference(form)
    seen = set()
    for found, tensors in results:
        assert found == pytest.approx(norms[since:], rel=1e-12)
        for name, (here, tensor) in tensors.items():
            torch.testing.assert_close(tensor, weights[name][here], rtol=1e-9, atol=1e-9)
        seen |= set(tensors)
    assert seen == set(weights)


LAYOUTS = {
    "two of each": MeshShape(dp=4, ep=2),
    "each on a rank": MeshShape(dp=2, ep=2),
    "context": MeshShape(dp=2, cp=2, ep=2),
    "nodes": MeshShape(dp=4, ep=2, zero_ranks=2),
    "tensor ranks have copies": MeshShape(tp=2, dp=2, ep=2),
    "all everywhere": MeshShape(dp=2),
}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_train_as_in_one_process(layout, stage):
    for form in FORMS:
        require(simulate(LAYOUTS[layout], trained, form, stage), form)


@pytest.mark.parametrize("stage", [0, 3])
def test_ranks_with_the_same_slice_of_ep_sum_their_gradients(stage):
    """4 ranks of ep, two experts: each lies on two of them, and what these give is a part of the sum."""
    require(simulate(MeshShape(dp=4, ep=4), trained, "cut", stage), "cut")


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_goes_on_under_any_other_layout(form, tmp_path):
    """From shards to none, over fewer ranks of ep and back: after the last step the weights are those of an uninterrupted run."""
    route = [(LAYOUTS["two of each"], 3), (MeshShape(), 0), (LAYOUTS["nodes"], 1), (LAYOUTS["all everywhere"], 2)]
    simulate(*route[0][:1], trained, form, route[0][1], 0, 1, None, tmp_path / "1")
    path = tmp_path / "1" / "step_00000001"
    names = {file.name for file in path.glob("weights*")}
    experts = {f"weights-tp00000-pp00000-ep0000{e}-dp0000{d}.safetensors" for e in (0, 1) for d in (0, 1)}
    assert names >= experts and names - experts <= {f"weights-tp00000-pp00000-dp0000{d}.safetensors" for d in range(4)}
    assert {t.ep for t in read_manifest(path).tensors.values()} == ({0} if form == "cut" else {0, 1})
    for step, (shape, stage) in enumerate(route[1:3], 1):
        simulate(shape, trained, form, stage, step, step + 1, path, tmp_path / str(step + 1))
        path = tmp_path / str(step + 1) / f"step_0000000{step + 1}"
    require(simulate(*route[3][:1], trained, form, route[3][1], STEPS, STEPS, path), form, since=STEPS)


def test_a_copy_of_an_expert_that_drifted_is_named():
    with pytest.raises(ReplicaError, match=r"parameter experts\.\w+, axis edp: rank 3 drifted from rank 1"):
        simulate(LAYOUTS["two of each"], partial(trained, break_one=True), "cut", 0)


def test_gradients_of_different_slices_are_not_summed():
    with pytest.raises(ValueError, match=r"w is split over ep: its gradients can be summed over edp, not dp_cp"):
        ParamSpec("w", (2, 3), Split(0, 2, "ep"))
    with pytest.raises(ValueError, match=r"w: average_over='dp' is no axis of replicas; use dp_cp, or edp"):
        ParamSpec("w", (2, 3), average_over="dp")
