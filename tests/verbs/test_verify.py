"""`megatrain verify`: names of layouts, which are legal, a covering set that agrees, and what is said of one that does not."""

import json
from collections import Counter
from dataclasses import replace
from itertools import combinations

import jobs
import pytest

from megatrain.cli import main as cli
from megatrain.config.schema import Config, ModelConfig, OptimConfig, TrainConfig
from megatrain.config.source import ConfigError
from megatrain.parallel.mesh import MeshShape
from megatrain.parallel.zero import FlatParameters
from megatrain.testing import Disagreement, resumed
from megatrain.testing.layouts import Layout, covering, every_layout, shrunk
from megatrain.verbs import verify

SMALL = Config(
    model=ModelConfig(
        num_layers=9, hidden_size=16, num_attention_heads=8, num_query_groups=4, seq_length=8, vocab_size=101, init_std=0.1
    ),
    optim=OptimConfig(lr=1e-2, warmup_steps=1),
    train=TrainConfig(steps=3, global_batch_size=16, micro_batch_size=2, precision="fp64"),
)
"""Tied embeddings, an odd vocabulary and an uneven number of layers."""


def write(tmp_path, **sections):
    tree = {
        "model": {k: v for k, v in vars(SMALL.model).items() if v is not None},
        "data": {"train": "none"},
        "train": {"global_batch_size": 16, "micro_batch_size": 2},
    }
    return jobs.write_config(tmp_path / "config.yaml", {**tree, **sections})


# --- layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "single",
        "tp2",
        "tp2-sp",
        "pp4-zb_h1",
        "tp2-sp-pp2-interleaved-dp2-zero3",
        "pp2-interleaved:3",
        "dp4-zero2-split",
        "pp2-zb_v-dp4-zero3:2-split",
        "gpipe",
    ],
)
def test_names(name):
    assert str(Layout.parse(name)) == name


def test_what_a_name_says():
    assert Layout.parse("tp2-sp-pp2-zb_v-dp4-zero3-split") == Layout(2, True, 2, "zb_v", 2, 4, 3, "split")
    assert Layout.parse("pp2-interleaved:3").chunks == 3
    shared = Layout.parse("dp8-zero1:4")
    assert (shared.zero, shared.zero_ranks, shared.shape) == (1, 4, MeshShape(dp=8, zero_ranks=4))


@pytest.mark.parametrize("name", ["tp", "tp0", "zero4-dp2", "dp2-zero0:2", "dp2-zero1:0", "tp2,pp2", "pp2-1F1B", "tp2--sp", ""])
def test_names_that_mean_nothing(name):
    with pytest.raises(ValueError, match=r"is not understood\. A layout is `single`, or parts joined by `-`"):
        Layout.parse(name)


def test_every_layout_once_and_on_powers_of_two():
    layouts = list(every_layout(8, ("fp32", "split")))
    assert len(set(map(str, layouts))) == len(set(layouts)) == len(layouts)
    assert Counter(layout.shape.world for layout in layouts).keys() == {1, 2, 4, 8}
    assert {layout.zero for layout in layouts if layout.dp > 1} == {0, 1, 2, 3}
    assert {(layout.dp, layout.zero_ranks) for layout in layouts if layout.zero_ranks} == {(4, 2), (8, 2), (8, 4)}
    assert {layout.zero for layout in layouts if layout.zero_ranks} == {1, 2, 3}
    assert all(layout.tp > 1 or not layout.sequence_parallel for layout in layouts)
    assert {layout.master for layout in layouts} == {"fp32", "split"}


def test_illegal_layouts_have_a_reason():
    assert "num_attention_heads=8" in Layout(tp=16).problem(SMALL)
    assert "num_layers=9" in Layout(pp=8, schedule="zb_v", chunks=2).problem(SMALL)
    assert "global_batch_size=16" in Layout(dp=32).problem(SMALL)
    assert "parallel.zero_ranks=3 does not divide the 4 data-parallel ranks" in Layout(dp=4, zero_ranks=3).problem(SMALL)
    assert Layout(pp=4, schedule="zb_v", chunks=2, dp=2).problem(SMALL) == ""


def test_the_set_for_processes_holds_every_pair():
    legal = [layout for layout in every_layout(8) if not layout.problem(SMALL)]
    many = [verify._columns(layout) for layout in legal if layout.shape.world > 1]
    chosen = [verify._columns(layout) for layout in verify._pairs(legal)]
    assert len(chosen) >= verify.PROCESSES_AT_LEAST and len(set(chosen)) == len(chosen)
    for i, j in combinations(range(len(many[0])), 2):
        assert {(p[i], p[j]) for p in chosen} == {(p[i], p[j]) for p in many}


def test_shrunk_keeps_the_structure():
    large = replace(
        SMALL,
        model=ModelConfig(
            num_layers=33, hidden_size=4096, num_attention_heads=32, num_query_groups=8, ffn_hidden_size=14336, seq_length=4096,
            vocab_size=50257, activation="swiglu", norm="rmsnorm", position="rope", tied_embeddings=False,
        ),
    )  # fmt: skip
    small = shrunk(large).model
    assert (small.num_layers, small.num_attention_heads, small.query_groups, small.vocab_size % 2) == (9, 8, 2, 1)
    assert small.ffn_size % small.num_attention_heads == 0
    assert 3 < small.ffn_size / small.hidden_size < 4
    kept = ("activation", "norm", "position", "tied_embeddings")
    assert all(getattr(small, key) == getattr(large.model, key) for key in kept)
    assert (small.seq_length, small.max_positions) == (16, None)
    for positions, kept_rows in ((4096, 16), (4100, 20), (8192, 32)):
        assert shrunk(replace(large, model=replace(large.model, max_positions=positions))).model.max_positions == kept_rows
    for layout in ("tp8", "tp2-sp-pp4-dp2-zero3", "pp4-zb_v"):
        assert Layout.parse(layout).problem(shrunk(large)) == ""
    late = ("global",) * 20 + ("local",)
    for given, pattern, kept in (
        ((1024, ("local", "global")), ("local", "global"), 4),
        ((256, late), ("global", "local"), 2),
        ((8192, ("local",)), ("local",), 32),
    ):
        windows = dict(zip(("window", "window_pattern"), given, strict=True))
        found = shrunk(replace(large, model=replace(large.model, **windows))).model
        assert (found.window_pattern, found.window) == (pattern, kept)


# --- agreement ------------------------------------------------------------------------------------------------------------

LEGAL = [layout for layout in every_layout(8) if not layout.problem(SMALL)]
CHOSEN = [
    LEGAL[0],
    *(dict(zip(map(verify._columns, LEGAL), LEGAL, strict=True))[p] for p in covering([verify._columns(x) for x in LEGAL], 2)),
]

FEW = CHOSEN[1::3]
"""Every value; end_to_end/test_agreement.py and test_zero.py compare every pair under another judge."""


@pytest.fixture(scope="module")
def verifier():
    return verify.Verifier(SMALL, 2, "fp64")


def test_the_few_have_every_value():
    columns = ({verify._columns(layout)[i] for layout in FEW} for i in range(9))
    assert list(columns) == [{verify._columns(layout)[i] for layout in LEGAL} for i in range(9)]


@pytest.mark.parametrize(
    "layout", [*FEW, *(pytest.param(layout, marks=pytest.mark.slow) for layout in CHOSEN if layout not in FEW)], ids=str
)
def test_every_pair_of_values_agrees(verifier, layout):
    assert max(verifier.check(layout).values()) < 1e-8


@pytest.mark.slow
def test_halves_of_masters_are_compared_to_the_bit():
    verifier = verify.Verifier(SMALL, 2, "bf16")
    verifier.check(Layout.parse("tp2-sp-dp2-zero3-split"))


def test_ranks_that_report_different_numbers_disagree(verifier):
    traces = [verifier.judge.reference, replace(verifier.judge.reference, losses=[1.0, 2.0])]
    with pytest.raises(Disagreement, match=r"step 0, losses: rank 1 reports 1\.0, rank 0"):
        verify._same_on_all_ranks(traces)


# --- the verb -------------------------------------------------------------------------------------------------------------


def test_the_verb(tmp_path, capsys):
    report = tmp_path / "report.json"
    words = ["verify", str(write(tmp_path)), "--layouts", "tp2-sp,dp2-zero3", "--steps", "2", "--json", str(report)]
    assert cli.main([*words, "parallel.reduce_dtype=bf16"]) == 0, "sums are exact in fp64"
    said = capsys.readouterr().out
    assert "2 of 2 layouts agree with one process" in said and "worst gradient" in said
    rows = json.loads(report.read_text())["rows"]
    assert [row["layout"] for row in rows] == ["tp2-sp", "dp2-zero3"]
    assert all(set(row["deviations"]) == {"loss", "grad_norm", "gradient", "weight", "state"} for row in rows)


def test_a_fault_is_named_and_the_exit_code_is_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify.os, "cpu_count", lambda: 1)  # a fault patched into this process is in no other
    monkeypatch.setattr(FlatParameters, "_sum_tied", lambda self: None)
    assert cli.main(["verify", str(write(tmp_path)), "--layouts", "tp2,pp2", "--steps", "2"]) == 1
    said = capsys.readouterr().out
    assert "FAILED pp2-1f1b on threads: gradient of step 0: embedding.tokens[" in said and "1 of 2 layouts agree" in said


def test_a_crash_of_one_layout_does_not_hide_the_others(monkeypatch):
    monkeypatch.setattr(verify.os, "cpu_count", lambda: 1)

    def broken(self):
        if self.ctx.pp.size > 1:
            raise ZeroDivisionError("in the sum")

    monkeypatch.setattr(FlatParameters, "_sum_tied", broken)
    rows = verify.verify(SMALL, "pp2,single", steps=2)
    assert rows[0].problem == "ZeroDivisionError: in the sum" and rows[1].problem == ""


@pytest.mark.parametrize(
    ("layouts", "said"),
    [
        ("tp3", "--layouts tp3: model.num_attention_heads=8 cannot be split over parallel.tensor_parallel_size=3"),
        ("dp3-zero1", "cannot be shared by 3 replicas"),
        ("nonsense", "'nonsense' in the layout 'nonsense' is not understood"),
        (",", "names none"),
    ],
)
def test_layouts_that_cannot_be(tmp_path, layouts, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        verify.plan_rows(SMALL, layouts, "fp64", processes=False)
    assert cli.main(["verify", str(write(tmp_path)), "--layouts", layouts]) == 1


def test_the_verb_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify.os, "cpu_count", lambda: 1)  # in this process; test_the_verb has others
    words = ["verify", str(write(tmp_path)), "--layouts", "tp2,dp2-zero2", "--steps", "3", "--resume"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "saved after 1 steps" in said and "2 of 2 layouts agree with one process" in said
    assert cli.main([*words[:-2], "1", "--resume"]) == 1
    assert "--resume interrupts a run half-way, and --steps 1 has no half" in capsys.readouterr().err


def test_a_run_that_forgets_is_found_when_it_is_resumed(monkeypatch):
    real = resumed.restore

    def forgetful(run, path):
        real(run, path)
        run.optimizer.updates.fill_(0)

    monkeypatch.setattr(resumed, "restore", forgetful)
    monkeypatch.setattr(verify.os, "cpu_count", lambda: 1)
    (row,) = verify.verify(SMALL, "tp2", steps=3, resume=True)
    assert "resumed under its own layout: losses are" in row.problem
