"""Whole training steps on one device: megatrain's and plain PyTorch's (plain_gpt.py), of the same shape, and one step taken apart."""

from __future__ import annotations

import collections
import gc
import math
import os
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import plain_gpt
import torch
import torch._dynamo
from isolated import Note
from torch.profiler import ProfilerActivity, profile

from megatrain.config.load import from_dict, load_overrides
from megatrain.config.schema import Config
from megatrain.plan.memory import ActivationLayout, layer_activation_bytes, state_bytes
from megatrain.runtime.distributed import connect
from megatrain.runtime.flops import model_flops_per_token, parameter_count
from megatrain.runtime.launch import Launch
from megatrain.training import Run, queue_step, train_step
from megatrain.verbs.bench import bench, export_trace, prepared

PEAK = 989.4e12
"""FLOP/s of an H100 SXM or H200, dense, BF16: what every MFU here is a share of."""
KERNELS_SHOWN = 30
STACK = 6
"""Frames of megatrain that are kept of what waits for the device."""


@dataclass(frozen=True)
class Shape:
    """A model, and the batch of one step."""

    layers: int
    hidden: int
    heads: int
    vocab: int
    seq_length: int
    micro_batch_size: int
    micro_batches: int
    llama: bool = False
    groups: int = 8
    ffn: int = 14336

    @property
    def name(self) -> str:
        """What a table says beside the model."""
        return f"{self.layers} layers, {self.micro_batches} x {self.micro_batch_size} x {self.seq_length} tokens"

    def smaller(self) -> Shape:
        """For a device that cannot hold it: the same batch in smaller pieces, or fewer layers."""
        if self.micro_batch_size > 1:
            return replace(self, micro_batch_size=self.micro_batch_size // 2, micro_batches=2 * self.micro_batches)
        return replace(self, layers=max(1, self.layers * 2 // 3))

    def ours(self, device: str, *others: str) -> Config:
        """As a config of megatrain."""
        words = {
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "seq_length": self.seq_length,
            "vocab_size": self.vocab,
        }
        if self.llama:
            words |= {"preset": "llama3_8b", "num_query_groups": self.groups, "ffn_hidden_size": self.ffn}
        batch = self.micro_batch_size
        tree: dict[str, Any] = {
            "model": words,
            "parallel": {"device": device},
            "train": {"precision": "bf16", "micro_batch_size": batch, "global_batch_size": batch * self.micro_batches},
            "optim": {"warmup_steps": 2},
        }
        return load_overrides(from_dict(tree), others)

    def plain(self, device: str, how: str, steps: int, warmup: int, backend: str) -> list[str]:
        """As arguments of plain_gpt.py."""
        given = {
            "layers": self.layers,
            "hidden": self.hidden,
            "heads": self.heads,
            "vocab": self.vocab,
            "seq-length": self.seq_length,
            "micro-batch-size": self.micro_batch_size,
            "micro-batches": self.micro_batches,
            "kind": "llama" if self.llama else "gpt",
            "groups": self.groups,
            "ffn": self.ffn,
            "steps": steps,
            "warmup": warmup,
            "device": device,
            "compile": how,
            "backend": backend,
        }
        return ["--precision", "bf16", *(word for key, value in given.items() for word in (f"--{key}", str(value)))]


def layers_that_fit(memory: int) -> int:
    """Of the 8B shape, for both sides: 18 bytes a parameter, the activations of docs/memory.md, the vocabulary's matrices and logits."""
    fixed = 18 * 2 * 128256 * 4096 + 8e9
    each = 18 * 218.1e6 + 0.75e9
    return max(1, min(32, math.floor((0.86 * memory - fixed) / each)))


def shapes(memory: int, smoke: bool) -> dict[str, Shape]:
    """The three models, each with a step of several micro-batches."""
    if smoke:
        small = Shape(2, 64, 2, 101, 32, 2, 2)
        return {"124m": small, "8b shape": Shape(2, 64, 2, 101, 32, 1, 2, True, 1, 96), "1.3b": small}
    return {
        "124m": Shape(12, 768, 12, 50304, 1024, 32, 4),
        "8b shape": Shape(layers_that_fit(memory), 4096, 32, 128256, 4096, 1, 8, True),
        "1.3b": Shape(24, 2048, 16, 50304, 2048, 4, 8),
    }


def expected_memory(config: Config) -> dict[str, float]:
    """Bytes by docs/memory.md, for one process without pipelining."""
    model, train = config.model, config.train
    vocab = model.vocab_size or 0
    layout = ActivationLayout(train.micro_batch_size)
    return {
        "states": state_bytes(1, 1, "bf16").total * parameter_count(model, vocab),
        "layers": model.num_layers * layer_activation_bytes(model, layout, train.recompute, 2),
        "logits": 2.0 * vocab * train.micro_batch_size * model.seq_length,
    }


def device_name() -> str:
    """Of the one device."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def ours(note: Note, shape: Shape, words: Sequence[str], steps: int, warmup: int) -> None:
    """`megatrain bench` of a shape."""
    config = shape.ours(device_name(), *words)
    session = connect(Launch.from_environment(os.environ), config.parallel, config.train.hang_timeout_seconds)
    try:
        report = bench(session, config, steps, warmup)
    finally:
        session.close()
    model = config.model
    flops = report["tokens_per_second"] * model_flops_per_token(model, model.vocab_size or 0)
    note(report | {"mfu": flops / PEAK, "shape": shape.name, "expected_memory": expected_memory(config)})


def plain(note: Note, shape: Shape, how: str, steps: int, warmup: int, backend: str = "inductor") -> None:
    """The same shape in plain PyTorch, compiled as one graph (`model`) or a block at a time (`blocks`)."""
    model = shape.ours(device_name()).model
    report = plain_gpt.measure(plain_gpt.parse(shape.plain(device_name(), how, steps, warmup, backend)))
    flops = report["tokens_per_second"] * model_flops_per_token(model, shape.vocab)
    note(report | {"mfu": flops / PEAK, "shape": shape.name})


def compile_ahead(note: Note, shapes: Sequence[Shape], backend: str = "inductor") -> None:
    """Fill torch's caches on disk with the graphs of whole plain models, whose compilation takes longest."""
    done = []
    for shape in shapes:
        small = replace(shape, micro_batches=1)
        plain_gpt.measure(plain_gpt.parse(small.plain(device_name(), "model", 1, 1, backend)))
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        done.append(shape.name)
        note(done)


@contextmanager
def synchronisations(found: collections.Counter[str]) -> Iterator[None]:
    """Count, by their stacks, the calls that make the host wait for the device."""

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        if "synchronizing" not in str(message):
            return
        frames = [f for f in traceback.extract_stack()[:-1] if "megatrain" in f.filename or "kernels" in f.filename]
        found[" < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames[-STACK:]))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def step_apart(note: Note, shape: Shape, words: Sequence[str], trace: Path) -> None:
    """One step of ours: what waits for the device, time and launches by kernel, a Chrome trace."""
    config = shape.ours(device_name(), *words)
    session = connect(Launch.from_environment(os.environ), config.parallel, config.train.hang_timeout_seconds)
    gpu = session.device.type == "cuda"
    with prepared(session, config) as run:
        for _ in range(3):
            train_step(run)
        found: dict[str, Any] = {"shape": shape.name}
        if gpu:
            counted: collections.Counter[str] = collections.Counter()
            with synchronisations(counted):
                queued = queue_step(run)
            queued.report()
            found["synchronisations"] = dict(counted.most_common())
            note(found)
        found |= _by_kernel(run, gpu, trace, note)
        note(found)
    session.close()


def _by_kernel(run: Run, gpu: bool, trace: Path, note: Note) -> dict[str, Any]:
    """Of one step under the profiler: milliseconds and calls by kernel (by operator on CPU), largest first."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    train_step(run)
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        train_step(run)
        run.flat.settle()
        if gpu:
            torch.cuda.synchronize()
        wall = time.perf_counter() - began
    rows = []
    for event in profiler.key_averages():
        on_device = str(event.device_type).endswith("CUDA")
        if on_device or not gpu:
            spent = event.self_device_time_total if gpu else event.self_cpu_time_total
            rows.append({"kernel": event.key[:90], "calls": event.count, "ms": spent / 1e3})
    rows.sort(key=lambda row: -row["ms"])
    busy = sum(row["ms"] for row in rows)
    runtime = {e.key: e.count for e in profiler.key_averages() if e.key.startswith(("cuda", "cuLaunch"))}
    found = {"wall_ms": 1e3 * wall, "busy_ms": busy, "launches": sum(row["calls"] for row in rows), "calls_of_cuda": runtime}
    found |= {"kernels": rows[:KERNELS_SHOWN], "others_ms": sum(row["ms"] for row in rows[KERNELS_SHOWN:])}
    note(found)
    export_trace(profiler.export_chrome_trace, trace)
    return found
