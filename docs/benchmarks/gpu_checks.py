"""What one GPU does with megatrain, in one JSON and one Markdown table: kernels against the memory's speed, models against plain PyTorch.

    python docs/benchmarks/gpu_checks.py --output runs/gpu_checks                  # on a GPU; no figure of it exists yet
    python docs/benchmarks/gpu_checks.py --output runs/gpu_checks --smoke          # seconds, tiny shapes, any machine: only that it runs

`launch/gpu_checks.sh` runs the tests marked `gpu` first, and then this. Kernels: time, the share of the measured copy speed (or matmul
peak) for the bytes (or FLOPs) that must be moved (or done), and the time of the reference and of torch.compile. Models: `megatrain bench`
(bf16, FP32 masters and accumulation, a whole step) and plain_gpt.py with torch.compile and SDPA (autocast, fused AdamW), one after the
other in processes of their own; MFU counts causal attention at half (megatrain/runtime/flops.py), for both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatrain.kernels import compiled
from megatrain.kernels.cross_entropy import gradient_of, statistics_of
from megatrain.kernels.dispatch import use_triton
from megatrain.kernels.gated import gated
from megatrain.kernels.norm import add_norm, norm
from megatrain.kernels.rotary import rotary

HERE = Path(__file__).parent
PLAIN_SECONDS = 150
"""Limit of one program; what has not ended by then is a row with its reason."""


def seconds_of(call: Callable[[], object], device: torch.device, rounds: int = 20) -> float:
    """Median seconds of a call."""
    for _ in range(3):
        call()
    found = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def copy_speed(device: torch.device, elements: int) -> float:
    """Bytes per second, read and written, of y.copy_(x)."""
    x = torch.empty(elements, dtype=torch.bfloat16, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds_of(lambda: y.copy_(x), device)


def matmul_speed(device: torch.device, n: int) -> float:
    """FLOP/s of a bf16 matrix product [n, n] x [n, n]."""
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * n**3 / seconds_of(lambda: a @ b, device)


def cases(
    device: torch.device, tokens: int, h: int, vocab: int
) -> dict[str, tuple[Callable[..., Any], Callable[..., Any], int]]:
    """Name -> (call(kernels), the same written out for the compiler, bytes that must move), forward and backward."""
    bf16 = {"dtype": torch.bfloat16, "device": device}
    x, r, dy = (torch.randn(tokens, 1, h, **bf16, requires_grad=i < 2) for i in range(3))
    weight = torch.ones(h, **bf16, requires_grad=True)
    heads = torch.randn(tokens, 1, h // 128 or 1, min(h, 128), **bf16, requires_grad=True)
    angles = torch.randn(tokens, 1, heads.shape[-1] // 2, device=device)
    cos, sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
    both = torch.randn(tokens, 1, 2 * h, **bf16, requires_grad=True)
    logits = torch.randn(tokens, vocab, **bf16)
    local, here = torch.zeros(tokens, dtype=torch.int64, device=device), torch.ones(tokens, dtype=torch.bool, device=device)
    one = torch.ones(tokens, device=device)

    def back(results: Any, *inputs: torch.Tensor) -> None:
        results = [results] if isinstance(results, torch.Tensor) else list(results)
        torch.autograd.grad(
            results, inputs, [dy.view(y.shape) if y.numel() == dy.numel() else torch.ones_like(y) for y in results]
        )

    def loss(kernels: str) -> None:
        top, *_ = statistics_of(logits, local, here, kernels=kernels)
        gradient_of(logits, top, one, None, local, here, one, kernels=kernels)

    stretch = compiled.compiled
    norms = {"eps": 1e-5, "rms": True}
    c_norm, c_add = stretch(compiled.norm, "bench", **norms), stretch(compiled.add_norm, "bench", **norms)
    c_turn, c_gate = stretch(compiled.rotary, "bench", interleaved=False), stretch(compiled.activation, "bench", kind="swiglu")
    row = x.nbytes
    return {
        "rmsnorm": (
            lambda k: back(norm(x, weight, None, kernels=k, **norms), x),
            lambda: back(c_norm(x, weight, None), x),
            5 * row,
        ),
        "add + rmsnorm": (
            lambda k: back(add_norm(x, r, weight, None, kernels=k, **norms), x, r),
            lambda: back(c_add(x, r, weight, None), x, r),
            8 * row,
        ),
        "rotary": (
            lambda k: back(rotary(heads, cos, sin, interleaved=False, kernels=k), heads),
            lambda: back(c_turn(heads, cos, sin), heads),
            4 * heads.nbytes,
        ),
        "swiglu": (
            lambda k: back(gated(*both.chunk(2, -1), "swiglu", kernels=k), both),
            lambda: back(c_gate(*both.chunk(2, -1)), both),
            3 * row + 5 * row,
        ),
        "cross-entropy": (loss, lambda: loss("reference"), 3 * logits.nbytes),
    }


def kernel_rows(device: torch.device, smoke: bool) -> list[dict[str, Any]]:
    """The kernel table."""
    tokens, h, vocab = (64, 128, 512) if smoke else (16384, 4096, 50304)
    copy, peak = copy_speed(device, 1 << (16 if smoke else 28)), matmul_speed(device, 128 if smoke else 8192)
    rows: list[dict[str, Any]] = [{"kernel": "copy", "gb_per_s": copy / 1e9}, {"kernel": "matmul bf16", "tflops": peak / 1e12}]
    serves = "triton" if use_triton("auto", device) else "reference"
    for name, (call, written_out, moved) in cases(device, tokens, h, vocab).items():
        rounds = 3 if smoke else 20
        ours = seconds_of(lambda call=call: call(serves), device, rounds)
        rows.append(
            {
                "kernel": name,
                "implementation": serves,
                "ms": 1e3 * ours,
                "share_of_copy": moved / ours / copy,
                "reference_ms": 1e3 * seconds_of(lambda call=call: call("reference"), device, rounds),
                "compile_ms": None if smoke else 1e3 * seconds_of(written_out, device, rounds),
            }
        )
    return rows


def shapes(device: torch.device, smoke: bool) -> dict[str, tuple[list[str], list[str]]]:
    """Name -> (overrides of megatrain bench, arguments of plain_gpt.py)."""
    if smoke:
        ours = ["model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=2", "model.seq_length=32"]
        ours += [
            "model.vocab_size=101",
            "train.global_batch_size=2",
            "train.micro_batch_size=2",
            "--steps",
            "2",
            "--warmup",
            "1",
        ]
        theirs = [
            "--layers",
            "2",
            "--hidden",
            "64",
            "--heads",
            "2",
            "--vocab",
            "101",
            "--seq-length",
            "32",
            "--micro-batch-size",
            "2",
        ]
        return {"smoke": (ours, [*theirs, "--steps", "2", "--warmup", "1"])}
    memory = torch.cuda.get_device_properties(device).total_memory
    # 18 bytes a parameter (docs/memory.md), about 1 GB of activations a layer at 4096 tokens, and the two matrices of the vocabulary.
    layers = int((0.8 * memory - 2 * 128256 * 4096 * 18 - 6e9) / (218e6 * 18 + 1.1e9))

    def gpt(layers: int, hidden: int, heads: int, s: int, batch: int) -> tuple[list[str], list[str]]:
        ours = [f"model.num_layers={layers}", f"model.hidden_size={hidden}", f"model.num_attention_heads={heads}"]
        ours += [f"model.seq_length={s}", "model.vocab_size=50304", f"train.micro_batch_size={batch}"]
        theirs = ["--layers", layers, "--hidden", hidden, "--heads", heads, "--seq-length", s, "--vocab", 50304]
        return [*ours, f"train.global_batch_size={batch}"], [*map(str, theirs), "--micro-batch-size", str(batch)]

    llama = ["model.preset=llama3_8b", f"model.num_layers={layers}", "model.seq_length=4096"]
    llama += ["train.micro_batch_size=1", "train.global_batch_size=1", "train.loss_chunk=1024"]
    plain = ["--kind", "llama", "--layers", layers, "--hidden", 4096, "--heads", 32, "--seq-length", 4096, "--vocab", 128256]
    return {
        "gpt2 124m, seq 1024": gpt(12, 768, 12, 1024, 32),
        "gpt 1.3b, seq 2048": gpt(24, 2048, 16, 2048, 8),
        f"llama 8b shape, {layers} layers, seq 4096": (llama, [*map(str, plain), "--micro-batch-size", "1"]),
    }


def last_json(command: list[str]) -> dict[str, Any]:
    """The JSON line that a program ends with, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PLAIN_SECONDS, check=False, cwd=HERE.parents[1])
    except subprocess.TimeoutExpired:
        return {"problem": f"not done after {PLAIN_SECONDS} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"problem": (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]}


def model_rows(device: torch.device, smoke: bool, config: Path) -> list[dict[str, Any]]:
    """The model table."""
    rows = []
    config.write_text("train: {precision: bf16}\n")
    kind = ["parallel.device=cuda", "train.compile=block"] if device.type == "cuda" else ["parallel.device=cpu"]
    for name, (ours, theirs) in shapes(device, smoke).items():
        mine = last_json([sys.executable, "-m", "megatrain", "bench", str(config), *kind, *ours])
        plain = last_json(
            [sys.executable, str(HERE / "plain_gpt.py"), "--device", device.type, "--precision", "bf16"]
            + ([] if smoke else ["--compile", "--steps", "8", "--warmup", "3"])
            + theirs
        )
        row = {"model": name, "megatrain": mine, "plain": plain}
        if "tokens_per_second" in mine and "tokens_per_second" in plain:
            row["ratio"] = mine["tokens_per_second"] / plain["tokens_per_second"]
        rows.append(row)
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The tables for people."""
    lines = [f"# {report['device']}, torch {report['torch']}, {report['date']}", ""]
    lines += ["| kernel | by | ms | share of copy | reference ms | compile ms |", "| --- | --- | --- | --- | --- | --- |"]
    for row in report["kernels"]:
        if "ms" in row:
            columns = [row["kernel"], row["implementation"]]
            columns += [shown(row, *pair) for pair in (("ms", ".3f"), ("share_of_copy", ".2f"), ("reference_ms", ".3f"))]
            columns += [shown(row, "compile_ms", ".3f")]
        else:
            speed = f"{row['gb_per_s']:.0f} GB/s" if "gb_per_s" in row else f"{row['tflops']:.2f} TFLOP/s"
            columns = [row["kernel"], "torch", speed, "", "", ""]
        lines.append(f"| {' | '.join(columns)} |")
    lines += [
        "",
        "| model | tokens/s | MFU | memory, bytes | plain tokens/s | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["models"]:
        mine, plain = row["megatrain"], row["plain"]
        columns = [
            row["model"],
            shown(mine, "tokens_per_second", ".0f"),
            shown(mine, "mfu", ".3f"),
            shown(mine, "memory", ".3g"),
        ]
        columns += [shown(plain, "tokens_per_second", ".0f"), shown(row, "ratio", ".2f")]
        lines.append(f"| {' | '.join(columns)} |")
    for row in report["models"]:
        lines += [
            f"\n{row['model']}, {side}: {row[side]['problem']}" for side in ("megatrain", "plain") if "problem" in row[side]
        ]
    return "\n".join(lines) + "\n"


def shown(row: dict[str, Any], key: str, form: str) -> str:
    """A number of a row; - where there is none."""
    return "-" if row.get(key) is None else format(row[key], form)


def main() -> int:
    """Measure, and write OUTPUT.json and OUTPUT.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_checks"))
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, any machine")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU here; --smoke runs tiny shapes anywhere")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    report = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "kernels": kernel_rows(device, args.smoke),
        "models": model_rows(device, args.smoke, args.output.with_suffix(".yaml")),
    }
    args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))
    return int(any("problem" in row[side] for row in report["models"] for side in ("megatrain", "plain")))


if __name__ == "__main__":
    raise SystemExit(main())
