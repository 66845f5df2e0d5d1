"""The training program from Python: what a run leaves behind, own objectives, evaluation, and steps that must not count."""

import json
import math
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jobs
import pytest
import torch
import torch.nn.functional as F
from layout_grid import config_of

import megatrain
from megatrain.assembly import assemble
from megatrain.config.load import from_dict, load
from megatrain.config.schema import TrainConfig
from megatrain.data.held_out import build_held_out
from megatrain.data.loader import Loader
from megatrain.evaluate import evaluate
from megatrain.models.batch import AttentionMask, Loss, MicroBatch, NextToken
from megatrain.parallel.mesh import ParallelContext
from megatrain.program import Watch, prepare_torch
from megatrain.testing import simulate
from megatrain.testing.trace import RandomSamples, mesh_shape
from megatrain.training import train_step

pytestmark = pytest.mark.usefixtures("one_thread")

ROW = {
    "step", "loss", "token_accuracy", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "step_seconds",
    "tflops_per_device", "mfu", "memory_peak_bytes", "skipped", "wait_seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder with training data and held-out data."""
    folder = tmp_path_factory.mktemp("program")
    jobs.write_store(folder / "data")
    jobs.write_store(folder / "held_out", documents=9)
    return folder


def tree(house, tmp_path, **sections):
    """A config of this test's own run directory."""
    return jobs.tiny({"train": str(house / "data"), "valid": str(house / "held_out")}, tmp_path / "run", **sections)


# --- what a run leaves behind -----------------------------------------------------------------------------------------------


def test_files_of_a_run(house, tmp_path):
    """The command as people start it, with everything that INTERFACE promises in the run's folder."""
    config = jobs.write_config(tmp_path / "config.yaml", tree(house, tmp_path, train={"eval_every": 3}))
    overrides = [
        "train.seed=5",
        "log.to=[tensorboard]",
        "checkpoint.save_every=3",
        "checkpoint.keep=2",
        "optim.warmup_steps=null",
    ]
    (ended,) = jobs.train(tmp_path / "job", str(config), *overrides)
    assert (ended.code, ended.err) == (0, "")
    run = tmp_path / "run"
    assert load(run / "config.yaml").config == load(config, overrides).config
    assert "seed: 5  # command line" in (run / "config.yaml").read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, evaluations = [line for line in lines if "loss" in line], [line for line in lines if "valid_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["step"] for line in evaluations] == [3, 6, 8]
    assert all(set(line) >= ROW for line in steps)
    assert [line["tokens"] for line in steps] == [8 * 16 * step for step in range(1, 9)]
    assert steps[0]["loss"] == pytest.approx(math.log(101), rel=0.02)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [event["event"] for event in jobs.events(run)] == ["start", "save", "save", "save", "end"]
    assert [event["step"] for event in jobs.events(run)] == [0, 3, 6, 8, 8]
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert checkpoints == [".lock", "latest", "step_00000006", "step_00000008"]
    assert (run / "checkpoints/latest").read_text() == "step_00000008\n"
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    (file,) = (run / "tensorboard").iterdir()
    assert b"lm loss" in file.read_bytes()
    assert not (run / "preempted").exists()
    assert sum(line.startswith("step ") for line in ended.out.splitlines()) == 8
    assert "step 8/8 | loss: " in ended.out and "validation loss at step 8" in ended.out
    assert "1 process on cpu" in ended.out
    assert "warm-up: 0 of 8 steps, as optim.warmup_steps is null" in ended.out


def test_a_config_may_be_a_file_a_tree_or_made_by_hand(house, tmp_path):
    given = tree(house, tmp_path)
    path = jobs.write_config(tmp_path / "config.yaml", given)
    runs = [megatrain.build(config) for config in (path, str(path), given, from_dict(given))]
    losses = {megatrain.train_step(run).loss for run in runs}
    assert len(losses) == 1
    assert runs[0].config == runs[3].config
    changed = megatrain.build(path, ["train.seed=3"])
    assert megatrain.train_step(changed).loss not in losses
    for run in [*runs, changed]:
        run.loader.close()


def test_weights_alone_begin_a_new_run(house, tmp_path):
    first = megatrain.build(tree(house, tmp_path))
    assert megatrain.train(first)
    saved = f"{tmp_path}/run/checkpoints/step_00000008"
    checkpoint = {"resume": saved, "weights_only": True, "dir": f"{tmp_path}/second"}
    second = megatrain.build(tree(house, tmp_path, checkpoint=checkpoint, optim={"name": "sgd"}))
    assert (second.step, second.consumed_samples, float(second.optimizer.updates)) == (0, 0, 0)
    assert str(second.resumed_from) == saved
    assert torch.equal(second.flat.weights, first.flat.weights)
    megatrain.train(second)
    third = megatrain.build(tree(house, tmp_path, checkpoint=checkpoint, optim={"name": "sgd"}))
    assert (third.step, str(third.resumed_from)) == (8, f"{tmp_path}/second/step_00000008")
    assert torch.equal(third.flat.weights, second.flat.weights)
    for run in (first, second, third):
        run.loader.close()


# --- own objectives ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LastHalf(NextToken):
    """Next token, counted in the second half of a sequence alone."""

    def counted(self, batch):
        half = batch.positions >= batch.tokens.shape[0] // 2
        return replace(batch, loss_weights=batch.loss_weights * half)

    def weight(self, batch):
        return super().weight(self.counted(batch))

    def __call__(self, head, hidden, batch):
        return super().__call__(head, hidden, self.counted(batch))


def plain_losses(run, tokens):
    """Loss of each label of samples [n, s + 1], by the model's logits and torch's own cross-entropy: [s, n]."""
    tokens = tokens.t()
    inputs, labels = tokens[:-1], tokens[1:]
    positions = torch.arange(len(inputs))[:, None].expand_as(inputs)
    places = torch.arange(inputs.shape[1])
    batch = MicroBatch(inputs, labels, torch.ones(inputs.shape), positions, places, 0, AttentionMask())
    model = run.chunks[0].eval()
    with torch.no_grad():
        logits = model.head.logits(model(None, batch))
    model.train()
    return F.cross_entropy(logits.permute(1, 2, 0), labels.t(), reduction="none").t()


def test_an_own_objective_trains(house, tmp_path):
    config = tree(house, tmp_path, train={"precision": "fp64"})
    run = megatrain.build(config, objective=LastHalf())
    samples = torch.stack([torch.from_numpy(run.loader.samples.sample(n)) for n in range(8)])
    expected = plain_losses(run, samples)[8:].mean()
    report = megatrain.train_step(run)
    assert report.loss == pytest.approx(float(expected), rel=1e-12)
    assert megatrain.train(run)
    assert run.step == 8
    losses = [row["loss"] for row in jobs.rows(tmp_path / "run").values()]
    assert len(losses) == 7 and losses[-1] < report.loss


def test_evaluation_is_the_mean_over_every_held_out_token(house, tmp_path):
    config = tree(house, tmp_path, train={"precision": "fp64"}, model={"dropout": 0.1})
    run = megatrain.build(config)
    megatrain.train_step(run)
    held_out = build_held_out(run.config.data.valid, 16)[""]
    losses, tokens = 0.0, 0
    for n in range(len(held_out)):
        sample, labelled = held_out.sample(n)
        losses += float(plain_losses(run, torch.from_numpy(sample)[None])[:labelled].sum())
        tokens += labelled
    result = evaluate(run)
    assert tokens == result.tokens == 9 * 40 - 1
    assert result.loss == pytest.approx(losses / tokens, rel=1e-12)
    run.loader.close()


# --- precision and determinism ----------------------------------------------------------------------------------------------


def losses_of(config):
    run = megatrain.build(config)
    losses = [megatrain.train_step(run).loss for _ in range(run.config.train.steps)]
    run.loader.close()
    return losses


def test_bfloat16_follows_float32(house, tmp_path):
    exact, rounded = (
        losses_of(tree(house, tmp_path, train={"precision": precision, "steps": 60})) for precision in ("fp32", "bf16")
    )
    assert exact[-1] < 0.9 * exact[0]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)


def test_deterministic_runs_are_the_same_to_the_bit(house, tmp_path):
    config = tree(house, tmp_path, train={"deterministic": True}, model={"dropout": 0.1})
    filled = torch.utils.deterministic.fill_uninitialized_memory
    try:
        first, second = losses_of(config), losses_of(config)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
    assert first == second


# --- steps that must not count ----------------------------------------------------------------------------------------------

CASES = [
    # tp, sequence parallel, dp; precision; optimizer; parameter
    (2, False, 1, "fp32", "adamw", "layers.0.mlp.up.weight"),
    (2, False, 1, "fp32", "adamw", "final_norm.weight"),
    (2, True, 1, "bf16", "adamw", "layers.1.attention_norm.bias"),
    (1, False, 2, "bf16", "adam", "embedding.tokens"),
    (1, False, 2, "fp64", "adamw", "embedding.positions"),
    (2, True, 2, "fp32", "sgd", "layers.0.attention.key.weight"),
]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("before_sum", [True, False], ids=["computed", "after the sum over ranks"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(case, before_sum, bad):
    """Also where the broken copy is not the one that counts in the norm."""
    tp, sequence_parallel, dp, precision, optimizer, name = case
    config = config_of((tp, sequence_parallel, dp, 4), (True, 101, 2, 0.1, precision))
    config = replace(config, optim=replace(config.optim, name=optimizer))
    shape = mesh_shape(config, dp)

    def steps(ctx):
        t = config.train
        with Loader(RandomSamples(101, 16), t.global_batch_size, t.micro_batch_size, ctx.dp.rank, ctx.dp.size) as loader:
            run = assemble(config, ctx, loader, 101)
            assert not train_step(run).skipped
            run.flat.settle()
            tensors = [run.flat.weights, run.optimizer.updates, *kept_by(run.optimizer)]
            before = [tensor.clone() for tensor in tensors]
            if ctx.world.rank == shape.world - 1:
                break_gradient(run, name, bad, before_sum)
            broken = train_step(run)
            assert broken.skipped and not math.isfinite(broken.grad_norm)
            run.flat.settle()
            assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))
            vars(run.flat).pop("reduce", None)
            after = train_step(run)
            assert not after.skipped and math.isfinite(after.loss)
            assert not torch.equal(before[0], run.flat.weights)
            return broken.step, after.step, after.loss, float(run.optimizer.updates)

    results = simulate(shape, steps)
    assert set(results) == {(2, 3, results[0][2], 2.0)}


def break_gradient(run, name, bad, before_sum):
    """Put one bad number into the gradient of `name`, before or after it is summed over the ranks."""
    (parameter,) = (p for p in run.flat.parameters if p.spec.name == name)
    real = run.flat.reduce
    if before_sum:
        run.flat.overlap = False  # else the sum has begun by then

    def reduce():
        if before_sum:
            parameter.main_grad.view(-1)[3] = bad
        real()
        if not before_sum:
            owned = run.flat.owned
            segment = next((s for s in owned if s.parameter is parameter), owned[0])
            segment.gradient[3] = bad

    run.flat.reduce = reduce


def kept_by(optimizer):
    """Every tensor that an optimizer keeps between steps."""
    masters = [m.masters for m in optimizer.masters if m.masters is not None]
    return [*masters, *(state for of in optimizer.states for state in of.values())]


@dataclass(frozen=True)
class BadAt(NextToken):
    """Next token, but at one step the loss is not a number, or nothing counts."""

    step: int
    nothing: bool = False

    def weight(self, batch):
        return super().weight(batch) * (0.0 if self.nothing and batch.step == self.step else 1.0)

    def __call__(self, head, hidden, batch):
        loss = super().__call__(head, hidden, batch)
        if batch.step != self.step:
            return loss
        factor = 0.0 if self.nothing else math.nan
        correct = loss.statistics["correct"] * (0.0 if self.nothing else 1.0)
        return Loss(loss.total * factor, {"correct": correct})


def test_a_loss_that_is_no_number_is_recorded_and_skipped(house, tmp_path):
    run = megatrain.build(tree(house, tmp_path), objective=BadAt(step=2))
    assert megatrain.train(run)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert [line["skipped"] for line in lines] == [False, False, True, False, False, False, False, False]
    assert lines[2]["loss"] is None and lines[2]["nonfinite"]["loss"] == "nan"
    assert float(run.optimizer.updates) == 7
    assert bool(run.flat.weights.isfinite().all())
    run.loader.close()


def test_a_batch_in_which_nothing_counts_has_loss_zero(house, tmp_path):
    run = megatrain.build(tree(house, tmp_path, optim={"name": "sgd", "weight_decay": 0.0}), objective=BadAt(0, nothing=True))
    before = run.flat.weights.clone()
    report = train_step(run)
    assert (report.loss, report.accuracy, report.grad_norm, report.skipped) == (0.0, 0.0, 0.0, False)
    assert torch.equal(run.flat.weights, before)
    assert train_step(run).loss > 1
    run.objective = BadAt(run.step, nothing=True)
    result = evaluate(run)
    assert (result.loss, result.accuracy, result.tokens) == (0.0, 0.0, 0)
    run.loader.close()


def test_all_weights_zero_on_simulated_replicas():
    """One replica has nothing to learn from: the other's tokens are the divisor, as on one process."""
    config = config_of((1, False, 2, 4), (True, 101, 1, 0.0, "fp64"))

    def first_loss(ctx, half_of):
        t = config.train
        micro_batch = t.micro_batch_size * 2 // ctx.dp.size
        with Loader(RandomSamples(101, 16), t.global_batch_size, micro_batch, ctx.dp.rank, ctx.dp.size) as loader:
            run = assemble(config, ctx, loader, 101, objective=FirstPlaces(half_of))
            return train_step(run).loss

    (alone,) = {first_loss(ParallelContext.single(), 8)}
    assert simulate(2, first_loss, 8) == pytest.approx([alone] * 2, rel=1e-12)
    assert simulate(2, first_loss, 0) == [0.0, 0.0]


@dataclass(frozen=True)
class FirstPlaces(NextToken):
    """Next token in the first places of the global batch alone."""

    places: int

    def counted(self, batch):
        return replace(batch, loss_weights=batch.loss_weights * (batch.samples < self.places))

    def weight(self, batch):
        return super().weight(self.counted(batch))

    def __call__(self, head, hidden, batch):
        return super().__call__(head, hidden, self.counted(batch))


# --- data parallelism -------------------------------------------------------------------------------------------------------


def test_copies_are_compared_every_so_many_steps(house, tmp_path, monkeypatch):
    at = []
    run = megatrain.build(tree(house, tmp_path, train={"audit_every": 3, "audit_compute_every": 4}))
    monkeypatch.setattr("megatrain.auditor.audit", lambda *_, copies: at.append((run.step, copies)))
    monkeypatch.setattr("megatrain.auditor.recompute", lambda _: at.append((run.step, "computed again")))
    assert megatrain.train(run)
    assert at == [(3, True), (4, "computed again"), (6, True), (8, "computed again"), (8, False)]
    run.loader.close()


@pytest.mark.parametrize(
    ("parallel", "dp", "micro_batch_size", "expected"),
    [
        ({"zero_stage": 1}, 2, 2, []),
        ({"zero_stage": 1, "zero_ranks": 2}, 4, 2, []),
        (
            {"zero_stage": 1, "zero_ranks": 1},
            4,
            2,
            ["zero_ranks=1 shards nothing: all 4 replicas keep everything, as with parallel.zero_stage=0"],
        ),
        (
            {"zero_stage": 3, "zero_ranks": 2},
            4,
            2,
            [r"zero_stage=3 with 2 micro-batches on a rank moves [\d.]+ MB a step over the data axis, 2.3x of stage 1"],
        ),
        ({"zero_stage": 3}, 1, 2, ["parallel.zero_stage=3 changes nothing: there is one replica"]),
        ({"zero_ranks": 1}, 1, 2, ["parallel.zero_ranks=1 changes nothing: there is one replica"]),
        ({"reduce_dtype": "bf16"}, 1, 2, ["parallel.reduce_dtype=bf16 changes nothing: there is one replica"]),
        ({"zero_stage": 2}, 2, 8, []),
        ({"zero_stage": 2}, 2, 2, [r"zero_stage=2 with 4 micro-batches on a rank moves [\d.]+ MB a step .* 2.5x of stage 1"]),
        ({"zero_stage": 2, "reduce_dtype": "bf16"}, 2, 2, [r"zero_stage=2 with 4 .* 2.0x of stage 1"]),
        ({"zero_stage": 3}, 2, 8, [r"zero_stage=3 with 1 micro-batches on a rank moves [\d.]+ MB a step .* 1.5x of stage 1"]),
    ],
)
def test_what_is_wasteful_is_said_with_the_figure(parallel, dp, micro_batch_size, expected):
    config = config_of((1, False, dp, 4), (True, 101, 1, 0.1, "fp32"))
    config = replace(
        config,
        parallel=replace(config.parallel, **parallel),
        train=replace(config.train, micro_batch_size=micro_batch_size),
    )

    def notes(ctx):
        t = config.train
        with Loader(RandomSamples(101, 16), t.global_batch_size, t.micro_batch_size, ctx.dp.rank, ctx.dp.size) as loader:
            run = assemble(config, ctx, loader, 101)
            return Watch._notes(SimpleNamespace(config=config, job=run))

    for said in simulate(mesh_shape(config, dp), notes):
        assert len(said) == len(expected) and all(re.search(e, s) for e, s in zip(expected, said, strict=True)), said


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("fp64", False), ("bf16", True), ("fp16", True)])
def test_products_on_a_gpu_are_added_up_in_float32(precision, tf32):
    """None of 16 bits in 16 bits, and none of float32 with TensorFloat-32's 10 bits, which others may have switched on."""
    matmul, reduced = torch.backends.cuda.matmul, "reduced_precision_reduction"
    switches = [(matmul, f"allow_bf16_{reduced}"), (matmul, f"allow_fp16_{reduced}")]
    switches += [(matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]
    before = [getattr(of, name) for of, name in switches]
    try:
        for of, name in switches:
            setattr(of, name, True)
        prepare_torch(TrainConfig(precision=precision))
        assert [getattr(of, name) for of, name in switches] == [False, False, tf32, tf32]
    finally:
        for (of, name), value in zip(switches, before, strict=True):
            setattr(of, name, value)
