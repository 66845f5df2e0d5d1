"""On a GPU: the numbers of the CPU, under every switch that takes another kernel there, and several ranks on one GPU over gloo."""

import re

import jobs
import pytest
import torch

from megatrain.parallel.rng import bits, dropout, key, normal

pytestmark = pytest.mark.gpu

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 64, "vocab_size": 101, "init_std": 0.1}
LLAMA = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "position": "rope",
    "num_query_groups": 2,
    "bias": False,
    "tied_embeddings": False,
}
SWITCHES = {
    "gpt2": {},
    "llama": LLAMA,
    "dropout": {"dropout": 0.1},
    "padded vocabulary": {"vocab_size": 497, "logit_softcap": 5.0},
    "window": {**LLAMA, "window": 17},
    "sparse": {"sparse_block": 16, "sparse_local_blocks": 2},
    "alibi": {"position": "alibi"},
    "attention dropout": {"attention_dropout": 0.1},
    "glm": {"family": "glm", "vocab_size": 128},
    "glm, rotated": {**LLAMA, "family": "glm", "vocab_size": 128, "position": "rope_2d", "norm_placement": "deepnorm"},
}
BLANKS = {"objective": "glm", "glm": {"objective_mix": {"blank": 0.5, "sentence": 0.0, "document": 0.5}}}
WAYS = {"triton": {"kernels": "triton"}, "reference": {"kernels": "reference"}, "compiled": {"compile": "block"}}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return jobs.write_store(tmp_path_factory.mktemp("gpu") / "data")


def losses(store, folder, size=1, parallel=None, model=None, **train):
    """Of every step of a small run."""
    tree = jobs.tiny(store, folder / "run", model={**MODEL, **(model or {})}, optim={"name": "sgd", "lr": 0.1}, train=train)
    tree["parallel"] = parallel or {"device": "cuda"}
    if model and model.get("family") == "glm":
        tree["data"] |= BLANKS
    config = jobs.write_config(folder / "config.yaml", tree)
    for ended in jobs.train(folder / "job", str(config), size=size, seconds=120):
        assert ended.code == 0, ended.err
    return [row["loss"] for row in jobs.rows(folder / "run").values()]


@pytest.fixture(scope="module")
def on_cpu(store, tmp_path_factory):
    """The losses of a switch on the CPU, once."""
    found = {}

    def of(switch):
        if switch not in found:
            folder = tmp_path_factory.mktemp("cpu")
            found[switch] = losses(store, folder, parallel={"device": "cpu"}, model=SWITCHES[switch])
        return found[switch]

    return of


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_has_the_losses_of_the_cpu(store, tmp_path, on_cpu, switch):
    assert losses(store, tmp_path, model=SWITCHES[switch]) == pytest.approx(on_cpu(switch), rel=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_every_kind_of_kernel_has_the_losses_of_the_cpu(store, tmp_path, on_cpu, way):
    assert losses(store, tmp_path, model=LLAMA, **WAYS[way]) == pytest.approx(on_cpu("llama"), rel=1e-4)


def test_the_log_says_which_attention_serves(store, tmp_path):
    tree = jobs.tiny(store, tmp_path / "run", model={**MODEL, **LLAMA}, train={"precision": "bf16", "steps": 1})
    config = jobs.write_config(tmp_path / "config.yaml", {**tree, "parallel": {"device": "cuda"}})
    (ended,) = jobs.train(tmp_path / "job", str(config), seconds=120)
    assert ended.code == 0, ended.err
    assert re.search(r"attention: (cudnn|flash|efficient) .*at \[\d+, 4, 64, 16\]", ended.out), ended.out


@pytest.mark.parametrize("switch", ["llama", "attention dropout"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_are_near(store, tmp_path, on_cpu, precision, switch):
    assert losses(store, tmp_path, model=SWITCHES[switch], precision=precision) == pytest.approx(on_cpu(switch), rel=2e-2)


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_parallel_size": 2, "schedule": "zb_h1"},
        {"zero_stage": 2},
        {"zero_stage": 3},
    ],
    ids=str,
)
def test_two_ranks_on_one_gpu_agree_with_one_process(store, tmp_path, on_cpu, layout):
    parallel = {"device": "cuda", "backend": "gloo", **layout}
    assert losses(store, tmp_path, size=2, parallel=parallel, model=SWITCHES["llama"]) == pytest.approx(
        on_cpu("llama"), rel=1e-4
    )


def test_with_the_flag_a_run_that_was_stopped_ends_on_the_same_bits(store, tmp_path):
    """Without it the gradient of the embedding is added up in any order on CUDA."""
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    whole = losses(store, tmp_path / "whole", model=SWITCHES["llama"], deterministic=True)
    first = losses(store, tmp_path / "parts", model=SWITCHES["llama"], deterministic=True, steps=4)
    assert first == whole[:4]
    both = losses(store, tmp_path / "parts", model=SWITCHES["llama"], deterministic=True)
    assert both == whole


def test_a_gpu_makes_the_same_numbers():
    k, samples = key(1, "device"), torch.arange(4)
    assert torch.equal(bits(k, 2**32 - 1000, 1 << 20, "cuda").cpu(), bits(k, 2**32 - 1000, 1 << 20))
    assert torch.equal(normal(k, (1 << 10, 1 << 10), device="cuda").cpu(), normal(k, (1 << 10, 1 << 10)))
    x = torch.randn(128, 4, 256, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dropout(x.to("cuda", dtype), 0.1, k, samples).cpu(), dropout(x.to(dtype), 0.1, k, samples))
