"""FLOPs against published numbers, textbook formulas and torch's own counter; peaks against data sheets."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from megatrain.config.schema import ModelConfig
from megatrain.runtime import flops
from megatrain.runtime.flops import (
    Peak,
    Speed,
    hardware_flops_per_token,
    measure_peak,
    model_flops_per_token,
    parameter_count,
    peak_flops,
    peak_of_job,
    published_peak,
)
from megatrain.runtime.launch import Launch
from megatrain.testing import simulate

GPT2 = ModelConfig(num_layers=12, hidden_size=768, num_attention_heads=12, seq_length=1024)
LLAMA3_8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_query_groups=8,
    ffn_hidden_size=14336,
    seq_length=8192,
    norm="rmsnorm",
    activation="swiglu",
    position="rope",
    bias=False,
    tied_embeddings=False,
)


@pytest.mark.parametrize(
    ("model", "vocab_size", "published"),
    [(GPT2, 50257, 124_439_808), (LLAMA3_8B, 128256, 8_030_261_248)],
    ids=["gpt2", "llama3"],
)
def test_parameter_counts_are_the_published_ones(model, vocab_size, published):
    assert parameter_count(model, vocab_size) == published


def test_full_attention_is_the_palm_formula():
    norms = 4096 * (2 * 32 + 1)
    multiplied = 8_030_261_248 - 128256 * 4096 - norms  # all but the input embedding and the norms
    assert model_flops_per_token(LLAMA3_8B, 128256, causal_half=False) == 6 * multiplied + 12 * 32 * 4096 * 8192


def test_causal_half_takes_away_half_of_the_attention_term_only():
    full, half = (model_flops_per_token(LLAMA3_8B, 128256, causal_half=flag) for flag in (False, True))
    assert full - half == 6 * 32 * 4096 * 8192
    assert model_flops_per_token(LLAMA3_8B, 128256) == half


def test_full_recompute_is_megatrons_formula_of_2021():
    layers, h, s, vocab = 12, 768, 1024, 50257
    megatron = 96 * layers * h**2 * (1 + s / (6 * h) + vocab / (16 * layers * h))
    assert hardware_flops_per_token(GPT2, vocab, "full", causal_half=False) == pytest.approx(megatron, rel=1e-12)


def test_recompute_adds_the_forward_of_what_is_done_again():
    model = model_flops_per_token(GPT2, 50257)
    attention = 12 * 4 * 768 * 512
    assert hardware_flops_per_token(GPT2, 50257, "none") == model
    assert hardware_flops_per_token(GPT2, 50257, "selective") == model
    assert hardware_flops_per_token(GPT2, 50257, "full") - model == attention + 12 * 2 * 12 * 768**2


def test_agrees_with_torchs_counter_on_a_grouped_query_gated_block_and_head():
    s, b, h, a, g, d, f, v = 32, 2, 48, 6, 2, 8, 40, 101
    model = ModelConfig(
        num_layers=1,
        hidden_size=h,
        num_attention_heads=a,
        num_query_groups=g,
        ffn_hidden_size=f,
        seq_length=s,
        activation="swiglu",
    )
    query, key, value, output, gate, up, down, head = (
        torch.randn(n, m, requires_grad=True)
        for n, m in ((a * d, h), (g * d, h), (g * d, h), (h, a * d), (f, h), (f, h), (h, f), (v, h))
    )
    x = torch.randn(b, s, h, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        q, k, v_ = (linear(x, w).view(b, s, -1, d).transpose(1, 2) for w in (query, key, value))
        k, v_ = (t.repeat_interleave(a // g, dim=1) for t in (k, v_))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            mixed = scaled_dot_product_attention(q, k, v_)
        y = linear(mixed.transpose(1, 2).reshape(b, s, a * d), output)
        linear(linear(torch.sigmoid(linear(y, gate)) * linear(y, up), down), head).sum().backward()
    assert counter.get_total_flops() == model_flops_per_token(model, v, causal_half=False) * s * b


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100 80GB PCIe", torch.float32, 19.5),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H100 NVL", torch.float16, 835.5),
        ("NVIDIA H200", torch.bfloat16, 989.4),
        ("NVIDIA GH200 480GB", torch.float64, 67),
        ("NVIDIA L40S", torch.bfloat16, 362.05),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA A10", torch.bfloat16, 125),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("Tesla V100-SXM2-16GB", torch.float16, 125),
        ("Tesla T4", torch.float16, 65),
    ],
)
def test_published_peaks(name, dtype, tflops):
    assert published_peak(name, dtype).flops == pytest.approx(tflops * 1e12)


def test_tf32_counts_only_where_it_is_on():
    assert published_peak("NVIDIA H100 80GB HBM3", torch.float32, tf32=True).flops == pytest.approx(494.7e12)
    assert published_peak("Tesla T4", torch.float32, tf32=True).flops == pytest.approx(8.1e12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA A10G", torch.bfloat16),
        ("NVIDIA GeForce RTX 4090 D", torch.bool),
        ("Tesla T4", torch.bfloat16),
        ("RTX 9999", torch.float16),
    ],
)
def test_what_is_not_published_is_not_guessed(name, dtype):
    peak = published_peak(name, dtype)
    assert peak.flops is None
    assert "log.peak_tflops" in peak.note
    assert name in peak.note


def test_peak_on_cpu_is_measured_and_short():
    peak = peak_flops("cpu", torch.float32)
    assert peak.note == "measured"
    assert peak.flops is not None
    assert 1e8 < peak.flops < 1e14


def test_sizes_take_turns_so_that_the_best_of_many_tries_counts(monkeypatch):
    """Other work takes the core away for 10 ms in every 20: what is longer than that is never measured undisturbed."""
    clock, tried = [0.0], []

    def multiplication(n, dtype, device):
        def multiply():
            tried.append(n)
            took = 2 * n**3 / (1e11 if n > 256 else 8e10)
            left = 0.02 - clock[0] % 0.02 - 0.01
            clock[0] += took if took < left else took + 0.01

        return multiply

    monkeypatch.setattr(flops, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(flops, "_multiplication", multiplication)
    assert measure_peak(torch.device("cpu"), torch.float32) == pytest.approx(1e11)
    assert set(tried) == {256, 512, 1024} and clock[0] < 0.2 and tried.count(512) > 3


def peak_on(ctx, launch):
    """The peak of a job as a rank of it finds it."""
    rank, here = ctx.world.rank, launch.local_world_size
    launch = replace(launch, rank=rank, local_rank=rank % here, world_size=ctx.world.size)
    world = SimpleNamespace(size=ctx.world.size)
    return peak_of_job(SimpleNamespace(launch=launch, device=ctx.device, world=world, everyone=ctx.world.group), torch.float32)


@pytest.mark.parametrize(
    ("launch", "cores", "measuring", "peak"),
    [
        (Launch(local_world_size=2), [{0, 1}] * 4, ["rank 0", "rank 2"], 5e9),
        (Launch(local_world_size=4), [{0, 1}] * 4, ["rank 0"], 2.5e9),
        (Launch(local_world_size=2), [{0}, {1}, {0}, {1}], ["rank 0", "rank 2"], 5e9),
        (Launch(local_world_size=2, cores=1), [{0, 1, 2}] * 4, ["rank 0", "rank 2"], 5e9),
    ],
    ids=["two nodes", "four ranks on two cores", "each its own core", "cores by SLURM"],
)
def test_one_rank_of_a_node_measures_alone_for_all(monkeypatch, launch, cores, measuring, peak):
    """A rank reaches 5 GFLOP/s on a core that it has alone."""
    measured = []
    rank = lambda: threading.current_thread().name  # noqa: E731
    monkeypatch.setattr(flops, "cores_here", lambda: cores[int(rank().split()[1])])
    monkeypatch.setattr(flops, "measure_peak", lambda device, dtype: measured.append(rank()) or 5e9)
    assert [of.flops for of in simulate(4, peak_on, launch)] == [peak] * 4
    assert sorted(measured) == measuring


def test_a_share_above_1_is_told_with_its_reason():
    speed = Speed(6e9, 8e9, devices=4, peak=Peak(1e12, "measured"))
    assert speed.doubt(500) is None
    assert speed.doubt(600) == (
        "120% of the peak cannot be: the peak of a device (measured) is too low. A measurement is, when other programs keep the "
        "machine busy meanwhile; log.peak_tflops=1.2 is what was reached now"
    )
    assert Speed(6e9, 8e9, 4, Peak(None, "unknown")).doubt(600) is None


def test_override_wins_and_must_be_positive():
    assert peak_flops("cpu", torch.float32, 2.5) == Peak(2.5e12, "given")
    with pytest.raises(ValueError, match=r"log\.peak_tflops=0"):
        peak_flops("cpu", torch.float32, 0)


def test_speed():
    speed = Speed(model_flops=6e9, hardware_flops=8e9, devices=4, peak=Peak(100e12, "given"))
    assert speed.tflops_per_device(20_000) == pytest.approx(30)
    assert speed.mfu(20_000) == pytest.approx(0.30)
    assert speed.hfu(20_000) == pytest.approx(0.40)
    assert Speed(6e9, 8e9, 4, Peak(None, "unknown")).mfu(20_000) is None
