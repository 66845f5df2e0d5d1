"""What `megatrain verify` trains on under ramps and GLM's micro-batches, and how it tells an ill-conditioned config from a fault."""

from dataclasses import replace

import jobs
import pytest

from megatrain.cli import main as cli
from megatrain.config.load import from_dict
from megatrain.config.schema import Config, ModelConfig, OptimConfig, TrainConfig
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.zero import FlatParameters
from megatrain.testing import Disagreement, agree, simulate
from megatrain.testing.layouts import Layout, for_replicas, shrunk
from megatrain.testing.trace import trace_run
from megatrain.verbs import verify

SINGLE = ParallelContext.single()


def small(model=None, optim=None, **train):
    given = {"steps": 3, "global_batch_size": 12, "micro_batch_size": 2, "precision": "fp64"} | train
    shape = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "seq_length": 8, "vocab_size": 61} | (model or {})
    return Config(
        ModelConfig(**shape), optim=OptimConfig(**{"lr": 1e-2, "warmup_steps": 1, **(optim or {})}), train=TrainConfig(**given)
    )


# --- ramps ----------------------------------------------------------------------------------------------------------------


def test_the_batches_of_a_ramp_are_its_own(one_thread):
    """4, 4, 8 and 12 sequences: the first steps are those of a run of 4, and the third is not."""
    ramped, four = (trace_run(SINGLE, small(**sizes), 3) for sizes in ({"batch_ramp": (4, 4, 16)}, {"global_batch_size": 4}))
    assert ramped.losses[:2] == four.losses[:2] and ramped.losses[2] != four.losses[2]


def test_a_layout_must_share_every_batch_of_a_ramp(monkeypatch, one_thread):
    monkeypatch.setattr(verify.os, "cpu_count", lambda: 1)  # no other processes
    config = small(batch_ramp=(4, 4, 16))
    assert Layout(dp=4).problem(config) == Layout(dp=2).problem(config) == ""
    assert Layout(dp=4).apply(config).train.micro_batch_size == 1
    assert Layout(dp=3).problem(config) == (
        "train.global_batch_size=12 with train.batch_ramp=[4, 4, 16] cannot be shared by 3 replicas"
    )
    rows = verify.verify(config, "dp4-zero2,tp2-pp2", steps=3)
    assert [row.problem for row in rows] == ["", ""]


def test_a_shrunk_ramp_is_still_one():
    train = shrunk(small(global_batch_size=1536, batch_ramp=(32, 32, 10**6))).train
    assert (train.global_batch_size, train.micro_batch_size, train.batch_ramp) == (16, 2, (8, 8, 16))


# --- micro-batches that are part of the data ----------------------------------------------------------------------------


def glm(batch=20, micro=4, **train):
    model = {"family": "glm", "num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "seq_length": 24, "vocab_size": 61}
    mix = {"blank": 0.4, "sentence": 0.2, "document": 0.4}
    data = {"train": "random", "tokenizer": "bytes", "objective": "glm", "glm": {"objective_mix": mix}}
    sizes = {"steps": 2, "global_batch_size": batch, "micro_batch_size": micro, "precision": "fp64"} | train
    return from_dict(
        {"model": {**model, "init_std": 0.1}, "data": data, "optim": {"lr": 1e-2, "warmup_steps": 1}, "train": sizes}
    )


@pytest.mark.parametrize(
    ("batch", "micro", "ramp", "replicas", "expected"),
    [
        (20, 4, None, 8, (16, 2, None)),
        (20, 4, None, 4, (16, 4, None)),
        (20, 2, None, 2, (20, 2, None)),
        (20, 2, None, 1, (20, 2, None)),
        (12, 2, None, 3, (12, 2, None)),
        (6, 6, None, 8, (8, 1, None)),
        (64, 4, (20, 4, 100), 4, (64, 4, (16, 16, 100))),
        (16, 4, (16, 4, 100), 4, (32, 4, (16, 16, 100))),
    ],
)
def test_batches_that_all_replicas_can_share(batch, micro, ramp, replicas, expected):
    train = for_replicas(glm(batch, micro, batch_ramp=ramp), replicas).train
    assert (train.global_batch_size, train.micro_batch_size, train.batch_ramp) == expected
    other = small(global_batch_size=batch, micro_batch_size=micro)
    assert for_replicas(other, replicas) == other


def test_no_layout_makes_these_micro_batches_smaller():
    config = glm()
    assert Layout(dp=4).apply(config).train.micro_batch_size == 4
    assert (
        Layout(dp=4).problem(config) == "train.global_batch_size=20 cannot be shared by 4 replicas in whole micro-batches of 4"
    )
    assert Layout(dp=5).problem(config) == ""


def test_a_glm_of_20_sequences_agrees_under_4_replicas(tmp_path, capsys, monkeypatch, one_thread):
    monkeypatch.setattr(verify.os, "cpu_count", lambda: 1)  # no other processes
    model = {"family": "glm", "seq_length": 24, "num_layers": 2, "hidden_size": 16, "num_attention_heads": 4}
    data = {"train": "none", "objective": "glm", "tokenizer": "bytes"}
    tree = {"model": model, "data": data, "train": {"global_batch_size": 20, "micro_batch_size": 4}}
    path = jobs.write_config(tmp_path / "config.yaml", tree)
    assert cli.main(["verify", str(path), "--layouts", "dp4-zero1,dp2-zero2", "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "train.global_batch_size=16 here instead of 20" in said and "2 of 2 layouts agree with one process" in said


# --- ill-conditioned configs -------------------------------------------------------------------------------------------

ILL = {
    "logits of 1e3": (
        {"num_layers": 6, "hidden_size": 32, "init_std": 3.0, "scale_residual_init": False, "position": "none"},
        {},
    ),
    "steps of 3": ({}, {"lr": 3.0, "name": "adam"}),
    "an eps of nothing": ({}, {"eps": 1e-16}),
}


@pytest.fixture(scope="module", params=ILL)
def ill(request):
    model, optim = ILL[request.param]
    config = small(model, optim, steps=4 if "lr" in optim else 2, global_batch_size=4)
    return verify.Verifier(config, config.train.steps, "fp64")


def test_what_is_ill_conditioned_agrees_and_is_told_with_figures(ill, one_thread):
    layout = Layout.parse("tp2")
    (trace, _) = simulate(layout.shape, trace_run, layout.apply(ill.config), ill.steps)
    with pytest.raises(Disagreement):
        agree(ill.judge.reference, trace, optimizer=ill.config.optim.name)
    found = ill.check(layout)
    note = ill.note(found)
    assert note.startswith("ill-conditioned: ") and "by a change of one process's weights in their last place" in note
    kind, deviation, _, control = note.split()[1:5]
    assert deviation == f"{found[kind]:.1e}" and 1e-13 < float(control.rstrip(",")) < 1e-2


def test_a_fault_is_one_in_an_ill_conditioned_config_too(ill, one_thread, monkeypatch):
    real = FlatParameters.reduce

    def too_much(self):
        real(self)
        if self.ctx.tp.rank:
            self.grads.mul_(1 + 1e-9)

    monkeypatch.setattr(FlatParameters, "reduce", too_much)
    with pytest.raises(Disagreement, match="gradient of step 0: "):
        ill.check(Layout.parse("tp2"))


def test_rows_and_summary_tell_what_is_ill_conditioned(monkeypatch, capsys, one_thread):
    monkeypatch.setattr(verify.os, "cpu_count", lambda: 1)
    rows = verify.verify(small({}, {"eps": 1e-16}, steps=2, global_batch_size=4), "tp2,single", steps=2)
    assert (
        [row.problem for row in rows] == ["", ""] and rows[0].note.startswith("ill-conditioned: weight ") and rows[1].note == ""
    )
    verify._summarise(rows, [])
    said = capsys.readouterr().out
    assert (
        "* tp2 on threads: ill-conditioned: weight" in said
        and "up to 32 times what rounding alone makes is no fault here" in said
    )
    assert "2 of 2 layouts agree" in said


def test_a_well_conditioned_config_needs_no_control(one_thread):
    verifier = verify.Verifier(small(global_batch_size=4), 2, "fp64")
    found = verifier.check(Layout.parse("tp2"))
    assert verifier.note(found) == "" and "control" not in vars(verifier.judge)
    with pytest.raises(Disagreement, match=r"deviation 1e-11 > 1e-12$"):  # and where it is run it changes nothing
        verifier.judge.hold(
            replace(verifier.judge.reference, losses=[loss * (1 + 1e-11) for loss in verifier.judge.reference.losses])
        )
