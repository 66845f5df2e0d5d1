"""Training controls: batch ramps, token budgets, validation sets, limits of time, steps left out, FP16, norms of parts."""

import json
import math

import jobs
import pytest
import torch
from zero_grid import config_of, shape_of

import megatrain
from megatrain.config.load import from_dict
from megatrain.testing import simulate
from megatrain.testing.layouts import Layout
from megatrain.testing.trace import trace_run
from megatrain.training import train_step
from megatrain.verbs.verify import Verifier

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp("controls")
    jobs.write_store(folder / "data")
    jobs.write_store(folder / "web", documents=9)
    jobs.write_store(folder / "code", documents=5)
    return folder


def tree(house, tmp_path, **sections):
    data = {"train": str(house / "data")} | sections.pop("data", {})
    return jobs.tiny(data, tmp_path / "run", **sections)


def rows(tmp_path):
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "valid_loss" in line], lines


def train(config):
    run = megatrain.build(config)
    try:
        return megatrain.train(run), run
    finally:
        run.loader.close()


def test_a_run_at_home_goes_on_and_its_config_keeps_the_tilde(house, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    jobs.write_store(tmp_path / "data")
    config = tree(house, tmp_path, data={"train": "~/data"}, log={"dir": "~/run"}, checkpoint={"dir": "~/kept"})
    done, run = train(config | {"train": config["train"] | {"steps": 3}})
    assert done and (tmp_path / "kept/latest").exists()
    assert '"~/run"' in (tmp_path / "run/config.yaml").read_text() and str(tmp_path) not in run.config_text
    done, run = train(config | {"train": config["train"] | {"steps": 4}})
    assert done and run.step == 4
    assert [line.split(": ")[1] for line in run.changes if line.startswith("changed")] == ["train.steps"]
    assert [row["step"] for row in rows(tmp_path)[0]] == [1, 2, 3, 4]


def test_a_ramp_trains_on_the_samples_in_order_and_resumes(house, tmp_path):
    controls = {"batch_ramp": [4, 4, 16], "global_batch_size": 12, "tokens": 16.0 * 100}
    given = tree(house, tmp_path, train=controls, checkpoint={"save_every": 3, "keep": 0})
    assert train(given)[0]
    steps = rows(tmp_path)[0]
    sizes = [4, 4, 8, *[12] * 7]
    assert [row["tokens"] for row in steps] == [16 * sum(sizes[: i + 1]) for i in range(10)]
    again = tree(house, tmp_path, train=controls, checkpoint={"resume": str(tmp_path / "run/checkpoints/step_00000003")})
    again["log"]["dir"] = str(tmp_path / "again/run")
    assert train(again)[0]
    rest = [json.loads(line) for line in (tmp_path / "again/run/metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rest] == [row["loss"] for row in steps[3:]]


def test_a_ramp_agrees_under_every_layout():
    point = (0, ("1f1b", 1, 1), (1, False), 1, 1, True, "none", 10**6)
    config = config_of(point)
    ramped = {"batch_ramp": (4, 4, 4), "micro_batch_size": 2, "steps": 3}
    config = from_dict({"model": vars(config.model), "optim": vars(config.optim), "train": vars(config.train) | ramped})
    verifier = Verifier(config, 3, "fp64")
    for layout in ("dp2-zero2", "pp2-zb_h1", "tp2-sp-pp2-interleaved"):
        assert max(verifier.check(Layout.parse(layout)).values()) < 1e-8


def test_every_validation_set_has_its_loss(house, tmp_path):
    sets = {"web": [str(house / "web")], "code": str(house / "code")}
    assert train(tree(house, tmp_path, data={"valid": sets}))[0]
    (row,) = rows(tmp_path)[1]
    assert set(row["valid_losses"]) == {"web", "code"}
    tokens = {"web": 9 * 40 - 1, "code": 5 * 40 - 1}
    assert row["valid_tokens"] == sum(tokens.values())
    mean = sum(row["valid_losses"][name] * tokens[name] for name in tokens) / sum(tokens.values())
    assert row["valid_loss"] == pytest.approx(mean)


def test_a_file_ends_the_run_with_a_checkpoint(house, tmp_path):
    stop = tmp_path / "stop"
    given = tree(house, tmp_path, train={"exit_file": str(stop)})
    run = megatrain.build(given)
    real = run.loader.batch
    run.loader.batch = lambda consumed: (stop.touch() if consumed == 24 else None, real(consumed))[1]
    assert not megatrain.train(run)
    run.loader.close()
    # The fourth step carries the wish, which is known when the fifth is queued.
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_00000005\n"
    assert (tmp_path / "run/preempted").exists()
    stop.unlink()
    assert train(given)[0]


def test_a_time_limit_ends_the_command_with_the_code_of_a_preemption(house, tmp_path):
    config = jobs.write_config(tmp_path / "config.yaml", tree(house, tmp_path, train={"exit_after_minutes": 1e-4}))
    (ended,) = jobs.train(tmp_path / "job", str(config))
    assert (ended.code, ended.err) == (75, "")
    assert len(rows(tmp_path)[0]) == 2


def test_steps_left_out_change_nothing(house, tmp_path):
    run = megatrain.build(tree(house, tmp_path, train={"skip_steps": [2, 3]}))
    reports, weights = [], []
    for _ in range(4):
        reports.append(train_step(run))
        run.flat.settle()
        weights.append(run.flat.weights.clone())
    run.loader.close()
    assert [report.skipped for report in reports] == [False, True, True, False]
    assert not any(report.overflow for report in reports)
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert (run.consumed_samples, int(run.optimizer.updates)) == (32, 2)


@pytest.mark.parametrize("layout", [(0, 1), (1, 2), (3, 2)], ids=str)
def test_norms_of_parts_make_the_norm_of_all(layout):
    stage, tp = layout

    def look(ctx):
        from megatrain.watch import part_norms

        seen, parts = {}, {}

        def before(run):
            seen.update(part_norms(run.flat, run.ctx, run.loss_scale.scale))

        def prepare(run):
            run.observers.before_update.append(before)
            parts.update({p.spec.name: p.spec.part for p in run.flat.parameters})

        trace = trace_run(ctx, config, 1, prepare=prepare)
        return seen, parts, trace

    config = config_of((stage, ("1f1b", 1, 2), (tp, tp > 1), 2, 1, False, "none", 500))
    ranks = simulate(shape_of((stage, ("1f1b", 1, 2), (tp, tp > 1), 2, 1, False, "none", 500)), look)
    parts = {name: part for _, of_rank, _ in ranks for name, part in of_rank.items()}
    for seen, _, trace in ranks:
        assert set(seen) == {"embedding", "attention", "mlp", "norm", "head"}
        assert math.sqrt(sum(g * g for g, _ in seen.values())) == pytest.approx(trace.grad_norms[0], rel=1e-9)
        for part, (gradient, _) in seen.items():
            squares = sum(float(g.square().sum()) for name, g in trace.gradients.items() if parts[name] == part)
            assert gradient == pytest.approx(math.sqrt(squares), rel=1e-9)


def test_norms_are_written(house, tmp_path):
    assert train(tree(house, tmp_path, log={"norms_every": 4}))[0]
    written = [line for line in rows(tmp_path)[2] if "norms_of_step" in line]
    assert [line["norms_of_step"] for line in written] == [4, 8]
    assert written[0]["grad-norm/mlp"] > 0 and written[0]["weight-norm/embedding"] > 0


# --- FP16 -----------------------------------------------------------------------------------------------------------------


def overflow_on_one_rank(ctx, steps, at):
    """FP16 on two replicas, the gradient of one of which overflows at some steps."""
    config = config_of((1, ("1f1b", 1, 1), (1, False), 2, 1, False, "none", 500))
    values = vars(config.train) | {"precision": "fp16", "loss_scale": 256.0, "loss_scale_window": 4, "steps": steps}
    parallel = vars(config.parallel) | {"overlap": False}  # so that the gradient is whole when the rank's own fault is put in
    config = from_dict({"model": vars(config.model), "optim": vars(config.optim), "train": values, "parallel": parallel})
    found = []

    def prepare(run):
        real = run.flat.reduce

        def reduce():
            if ctx.dp.rank == 1 and run.step in at:
                run.flat.trained[0].bucket.parameters[0].main_grad.view(-1)[0] = math.inf
            real()

        run.flat.reduce = reduce
        update = run.loss_scale.update

        def watched(overflow):
            update(overflow)
            run.flat.settle()
            found.append((float(overflow), float(run.loss_scale.scale), run.flat.weights.clone()))

        run.loss_scale.update = watched

    trace = trace_run(ctx, config, steps, prepare=prepare)
    return found, trace.losses


def test_fp16_recovers_from_overflows_on_one_rank_of_two():
    (one, losses), (other, others) = simulate(2, overflow_on_one_rank, 14, {3, 4})
    assert losses == others
    assert [o for o, _, _ in one] == [0, 0, 0, 1, 1, *[0] * 9]
    assert [scale for _, scale, _ in one] == [256] * 4 + [128] * 4 + [256] * 4 + [512] * 2
    for step, ((_, mine, weights), (_, theirs, same)) in enumerate(zip(one, other, strict=True)):
        assert mine == theirs and torch.equal(weights, same)
        if step:
            assert torch.equal(weights, one[step - 1][2]) == (step in (3, 4))
    assert all(map(math.isfinite, losses))


def test_fp16_is_near_fp32():
    def losses(precision):
        config = config_of((0, ("1f1b", 1, 1), (1, False), 1, 3, False, "none", 10**6))
        values = vars(config.train) | {"precision": precision, "steps": 10}
        from megatrain.parallel.mesh import ParallelContext

        config = from_dict({"model": vars(config.model), "optim": vars(config.optim), "train": values})
        return trace_run(ParallelContext.single(), config, 10).losses

    assert losses("fp16") == pytest.approx(losses("fp32"), rel=2e-3)


def test_fp16_resumes_with_its_scale(house, tmp_path):
    given = tree(
        house, tmp_path, train={"precision": "fp16", "loss_scale": 64.0, "loss_scale_window": 3}, checkpoint={"save_every": 4}
    )
    done, run = train(given)
    assert done
    steps = rows(tmp_path)[0]
    assert [row["loss_scale"] for row in steps] == [64, 64, 128, 128, 128, 256, 256, 256]
    given["checkpoint"] = {"resume": str(tmp_path / "run/checkpoints/step_00000004"), "dir": str(tmp_path / "other")}
    given["log"]["dir"] = str(tmp_path / "again")
    done, again = train(given)
    assert done and torch.equal(again.flat.weights, run.flat.weights)
    assert again.loss_scale.state() == run.loss_scale.state()
