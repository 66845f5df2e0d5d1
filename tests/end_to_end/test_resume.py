"""A run that is interrupted trains the same model: to the bit under its own layout, to rounding under any other."""

import dataclasses

import pytest
import torch

from megatrain.config.load import from_dict
from megatrain.optim.portions import portions
from megatrain.parallel.mesh import ParallelContext
from megatrain.testing import simulate
from megatrain.testing.agree import agree
from megatrain.testing.control import last_steps
from megatrain.testing.layouts import Layout
from megatrain.testing.resumed import continued, interrupted, require_same_bits
from megatrain.testing.trace import trace_run

STEPS, AT = 4, 2
LAYOUTS = [
    "single",
    "tp2",
    "tp4-sp",
    "pp2",
    "pp2-zb_h1",
    "dp2",
    "dp4-zero1",
    "dp2-zero2",
    "dp2-zero3",
    "tp2-sp-dp2-zero3",
    "pp2-interleaved-dp2-zero1",
    "tp2-pp2-zb_v",
    "tp2-pp2-dp2-zero2",
    "dp3-zero3",
]


def config_of(**train):
    model = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "seq_length": 12}
    model |= {"vocab_size": 101, "dropout": 0.1}
    train = {"steps": STEPS, "global_batch_size": 12, "micro_batch_size": 3, "precision": "fp64", **train}
    return from_dict(
        {"model": model, "train": train, "optim": {"lr": 1e-2, "warmup_steps": 1}, "parallel": {"bucket_size": 5000}}
    )


def run(name, work, config, *more):
    """The trace of one rank of a layout, all of whose losses are the same."""
    layout = Layout.parse(name)
    traces = simulate(layout.shape, work, layout.apply(config), STEPS, *more)
    assert all(trace.losses == traces[0].losses for trace in traces)
    return traces[0]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """The uninterrupted run of one process, and the folder in which each layout leaves its checkpoint."""
    return trace_run(ParallelContext.single(), config_of(), STEPS), tmp_path_factory.mktemp("resume")


def path_of(folder, name):
    """The checkpoint that a layout leaves, made when it is first asked for."""
    path = folder / name / f"step_{AT:08d}"
    if not path.is_dir():
        run(name, interrupted, config_of(), AT, folder / name)
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_under_the_same_layout_the_bits_are_the_same(house, name, one_thread):
    reference, folder = house
    plain = run(name, trace_run, config_of())
    again = run(name, interrupted, config_of(), AT, folder / name)
    require_same_bits(plain, again, name)
    agree(reference, again)


PAIRS = [(a, LAYOUTS[(i + step) % len(LAYOUTS)]) for i, a in enumerate(LAYOUTS) for step in (1, 4, 9)]


@pytest.mark.parametrize(("here", "there"), PAIRS)
def test_under_another_layout_the_run_goes_on_as_if_it_had_been_its_own(house, here, there, one_thread):
    reference, folder = house
    agree(last_steps(reference, AT), run(there, continued, config_of(), AT, path_of(folder, here)))


@pytest.mark.parametrize(("here", "there"), [(a, b) for a in ("fp32", "split") for b in ("fp32", "split")])
def test_masters_load_as_masters_of_either_kind(tmp_path, here, there, one_thread):
    """In BF16 the two kinds are the same numbers to the bit."""

    def config(master):
        given = config_of(precision="bf16")
        return dataclasses.replace(given, optim=dataclasses.replace(given.optim, master=master))

    def name(master):
        return "dp2-zero2" + "-split" * (master == "split")

    plain = run(name(there), trace_run, config(there))
    run(name(here), interrupted, config(here), AT, tmp_path)
    again = run(name(there), continued, config(there), AT, tmp_path / f"step_{AT:08d}")
    require_same_bits(last_steps(plain, AT), again, f"{here} to {there}")


def test_a_lost_moment_is_noticed(house, monkeypatch, one_thread):
    """The comparison can fail: a run that begins its second moments anew is not the same run."""
    reference, folder = house
    from megatrain.testing import resumed

    real = resumed.restore

    def forgetful(run, path):
        real(run, path)
        for portion in portions(run.optimizer)["exp_avg_sq"].values():
            everything = slice(0, portion.count)
            portion.elements.write(everything, portion.elements.read(everything).zero_())

    monkeypatch.setattr(resumed, "restore", forgetful)
    with pytest.raises(AssertionError, match="step 1, loss"):
        agree(last_steps(reference, AT), run("dp2", continued, config_of(), AT, path_of(folder, "tp2")))
    assert torch.isfinite(torch.tensor(reference.losses)).all()
