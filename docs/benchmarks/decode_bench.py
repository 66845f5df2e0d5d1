"""Tokens a second that the engine writes, the time to the first token, and where a step's time goes; JSON.

    python docs/benchmarks/decode_bench.py                              # a GPU: Qwen3 0.6B, BF16, 256 requests, as nano-vllm's bench.py
    python docs/benchmarks/decode_bench.py --hidden 512 --layers 8      # random weights of any size: on a CPU one request at a time, and 16
    python docs/benchmarks/decode_bench.py --smoke                      # tiny, anywhere

Requests are of seed 0, prompts of 100 to 1,024 tokens, answers of 100 to 1,024 that no token ends; temperature 0.6. Half a minute of
measuring at most for each number of requests: what is not finished then is counted as far as it got.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from megatrain.config.presets import PRESETS
from megatrain.config.schema import ModelConfig
from megatrain.inference.engine import Engine, EngineSettings
from megatrain.inference.paged_model import ForwardModel
from megatrain.inference.requests import Request, Sampling
from megatrain.kernels.paged_attention import served_by
from megatrain.models.gpt import build_gpt
from megatrain.models.layers import Build
from megatrain.parallel.mesh import ParallelContext, Rows
from megatrain.parallel.pipeline_parallel import Unsharded
from megatrain.parallel.schedules import Schedule

WANTED = 5_000
"""Tokens a second, of 256 requests to Qwen3 0.6B on an H100."""
WARM_STEPS = 8
"""Steps before the clock starts: kernels are compiled, and memory is taken."""

PARTS = ("plan", "_rows", "_pages", "run_schedule", "attend", "paged_attention", "_numbers", "choose", "_sorted_out", "_absorb")
"""Functions of the engine whose share of a step is told; some are inside others."""


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    model: ModelConfig
    vocab_size: int
    dtype: torch.dtype
    device: torch.device
    requests: tuple[int, ...]
    """Numbers of requests side by side."""
    least: int
    most: int
    """Tokens of a prompt, and of an answer."""
    seconds: float
    """Of measuring, for each number of requests."""


def model_of(plan: Plan) -> ForwardModel:
    """Random weights."""
    ctx = ParallelContext.single(plan.device)
    build = Build(Rows(ctx.tp), plan.dtype, plan.device, plan.model, plan.vocab_size, seed=0)
    chunks = [chunk.eval() for chunk in build_gpt(build, [range(plan.model.num_layers)], (0,), 0)]
    return ForwardModel(ctx, chunks, Schedule("1f1b", 1, 1, 1, backward=False), Unsharded())


def requests_of(plan: Plan, count: int) -> list[Request]:
    """Prompts and lengths as nano-vllm's bench.py draws them."""
    draw = random.Random(0)
    ids = min(10_000, plan.vocab_size) - 1
    prompts = [tuple(draw.randint(0, ids) for _ in range(draw.randint(plan.least, plan.most))) for _ in range(count)]
    sampling = Sampling(temperature=0.6)
    return [Request(prompt, draw.randint(plan.least, plan.most), sampling, seed=i) for i, prompt in enumerate(prompts)]


def engine_of(plan: Plan, weights: ForwardModel) -> Engine:
    """An engine with room for all requests."""
    most = max(plan.requests)
    return Engine(weights, None, EngineSettings(most_running=most, cache_tokens=most * (2 * plan.most + 16)))


def settle(plan: Plan) -> None:
    """Wait for the device."""
    if plan.device.type == "cuda":
        torch.cuda.synchronize()


def writing(plan: Plan, weights: ForwardModel, count: int) -> dict[str, Any]:
    """Tokens a second of `count` requests that begin together, prompts and all."""
    engine = engine_of(plan, weights)
    for request in requests_of(plan, count):
        engine.add(request)
    settle(plan)
    began, busy = time.perf_counter(), time.process_time()
    while engine.busy and time.perf_counter() - began < plan.seconds:
        engine.step()
    settle(plan)
    seconds, stats = time.perf_counter() - began, engine.stats
    return {
        "requests": count,
        "tokens_per_second": stats.generated_tokens / seconds,
        "read_per_second": stats.prompt_tokens / seconds if not engine.busy else None,
        "tokens": stats.generated_tokens,
        "seconds": seconds,
        "cpu_seconds": time.process_time() - busy,
        "finished": not engine.busy,
        "preemptions": stats.preemptions,
        "steps": stats.steps,
    }


def one_user(plan: Plan, weights: ForwardModel) -> dict[str, float]:
    """The time to the first token after a prompt of (least + most) / 2 tokens, and of each one after it: medians, in ms."""
    engine, first, each = engine_of(plan, weights), [], []
    for seed in range(3):
        draw = random.Random(seed)
        prompt = tuple(draw.randrange(plan.vocab_size) for _ in range((plan.least + plan.most) // 2))
        engine.add(Request(prompt, min(48, plan.most), Sampling(temperature=0.6)))
        marks = [time.perf_counter()]
        while engine.busy:
            if engine.step():
                marks.append(time.perf_counter())
        first.append(1e3 * (marks[1] - marks[0]))
        each += [1e3 * (b - a) for a, b in pairwise(marks[1:])]
    return {"prompt_tokens": len(prompt), "first_token_ms": statistics.median(first), "token_ms": statistics.median(each)}


def one_step(plan: Plan, weights: ForwardModel, count: int, steps: int) -> dict[str, Any]:
    """Where the time of a step of `count` answers goes, by Python function; a profile costs time itself, so shares are told."""
    engine = engine_of(plan, weights)
    for request in requests_of(plan, count):
        engine.add(request)
    for _ in range(WARM_STEPS):
        engine.step()
    settle(plan)
    profile = cProfile.Profile()
    profile.enable()
    began = time.perf_counter()
    for _ in range(steps):
        engine.step()
    settle(plan)
    seconds = time.perf_counter() - began
    profile.disable()
    rows = pstats.Stats(profile).get_stats_profile().func_profiles
    wanted = (
        "plan",
        "_rows",
        "_pages",
        "run_schedule",
        "attend",
        "paged_attention",
        "choose",
        "_numbers",
        "_sorted_out",
        "_absorb",
    )
    shares = {name: rows[name].cumtime / seconds for name in wanted if name in rows}
    return {"requests": count, "profiled_ms": 1e3 * seconds / steps, "shares": shares}


def warm(plan: Plan, weights: ForwardModel) -> None:
    """Steps of few and of many rows, odd numbers and multiples of 16, which Triton compiles kernels for apart."""
    engine = engine_of(plan, weights)
    for count in (1, 3, 16):
        engine.run([Request((5,) * (number + 1), 3) for number in range(count)])
    for request in requests_of(plan, max(plan.requests)):
        engine.add(request)
    for _ in range(WARM_STEPS):
        engine.step()


def measured(plan: Plan, note: Callable[[dict[str, Any]], None] = lambda _found: None) -> dict[str, Any]:
    """All of it; `note` is given what there is so far."""
    weights = model_of(plan)
    device = torch.cuda.get_device_name() if plan.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    parameters = sum(p.numel() for chunk in weights.chunks for p in chunk.parameters())
    found: dict[str, Any] = {"device": device, "torch": torch.__version__, "dtype": str(plan.dtype).removeprefix("torch.")}
    found |= {
        "parameters": parameters,
        "attention": served_by("auto", plan.device, plan.dtype, weights.chunks[0].build.config.head_size),
    }
    warm(plan, weights)
    note(found)
    found["one_user"] = one_user(plan, weights)
    note(found)
    found["writing"] = []
    for count in plan.requests:
        found["writing"].append(writing(plan, weights, count))
        note(found)
    found["step"] = one_step(plan, weights, max(plan.requests), 4 if plan.most < 100 else 32)
    note(found)
    return found


def plan_of(
    device: torch.device, smoke: bool, hidden: int | None = None, layers: int = 8, dtype: torch.dtype | None = None
) -> Plan:
    """The GPU's plan: Qwen3 0.6B and 256 requests. A CPU's: a small model, one request and 16."""
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if smoke:
        tiny = ModelConfig(
            num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, seq_length=64, position="rope"
        )
        return Plan(tiny, 199, dtype, device, (1, 4), 4, 16, 1.0)
    if hidden is None and device.type == "cuda":
        shape = dict(PRESETS["qwen3_0.6b"])
        vocab = shape.pop("vocab_size")
        return Plan(ModelConfig(**{**shape, "seq_length": 2064}), vocab, dtype, device, (256,), 100, 1024, 30.0)
    hidden = hidden or 512
    heads = max(1, hidden // 64)
    shape = {"num_attention_heads": heads, "num_query_groups": max(1, heads // 2), "activation": "swiglu", "norm": "rmsnorm"}
    small = ModelConfig(num_layers=layers, hidden_size=hidden, seq_length=1024, position="rope", bias=False, **shape)
    return Plan(small, 32_000, dtype, device, (1, 16), 32, 256, 10.0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--hidden", type=int, help="hidden size of a small model in the place of Qwen3 0.6B")
    parser.add_argument("--layers", type=int, default=8, help="its layers")
    parser.add_argument("--bf16", action="store_true", help="BF16 on a CPU too")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = plan_of(device, args.smoke, args.hidden, args.layers, torch.bfloat16 if args.bf16 else None)
    json.dump(measured(plan), sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
