"""`megatrain bench`: the speed of training a config here, on random tokens, as one line of JSON; alone or under torchrun.

First some steps are timed as they are. Then as many are timed phase by phase, with a wait for the device between phases, so that phases are
exact and the timed steps are not slowed down. MFU counts model FLOPs as in `runtime/flops.py`: half of the keys for causal attention.
"""

from __future__ import annotations

import errno
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled

from megatrain.assembly import DTYPES, assemble, kernels_of, mesh_shape, require_schedule
from megatrain.config.load import load
from megatrain.config.schema import Config
from megatrain.config.validate import require_effects, validate_step
from megatrain.data.loader import Loader
from megatrain.files import doing
from megatrain.init_from import shapes_of
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.schedules import Instruction
from megatrain.program import prepare_torch, require_memory, require_precision, vocabulary
from megatrain.runtime.allocator import tune_allocator
from megatrain.runtime.device_memory import memory_of, peak_memory_bytes
from megatrain.runtime.distributed import Session, connect
from megatrain.runtime.flops import Speed, hardware_flops_per_token, model_flops_per_token, parameter_count, peak_of_job
from megatrain.runtime.interface import launched
from megatrain.runtime.reports import Reports, StepReport
from megatrain.testing.trace import ANY_DATA, random_source
from megatrain.training import Observers, Phase, Run, queue_step, train_step

PHASES = ("data", "forward", "backward", "reduce", "optimizer")
PROFILED = 2
"""Number of steps in a profile."""


def bench(session: Session, config: Config, steps: int, warmup: int, profile: Path | None = None) -> dict[str, Any]:
    """Train `config` on random tokens and measure (collective); returns the numbers of this rank.

    steps: number of timed steps, after `warmup` untimed ones; as many again are timed by phase. profile: file for a Chrome trace of two
    more steps. Raises ConfigError.
    """
    with prepared(session, config) as run:
        for _ in range(warmup):
            train_step(run)
        seconds, waits = _timed(run, steps)
        phases = _phases(run, steps)
        if profile is not None:
            _profile(run, profile if session.rank == 0 else None)
    return _report(run, seconds, waits, phases, session)


@contextmanager
def prepared(session: Session, config: Config) -> Iterator[Run]:
    """The run of `config` on random tokens; its loader is closed at the end of the block (collective). Raises ConfigError."""
    require_effects(config)
    config = replace(config, data=replace(config.data, train=ANY_DATA))
    validate_step(config, session.world.size)
    require_schedule(config)
    require_precision(config.train.precision, session.device)
    prepare_torch(config.train)
    vocab_size = vocabulary(config)
    with session.together("looking for memory"):
        require_memory(config, vocab_size, session.world.size, memory_of(session.device))
    ctx = ParallelContext.build(session.world, mesh_shape(config.parallel, session.world.size), session.device)
    (samples, compose), train = random_source(config, vocab_size), config.train
    with Loader(samples, train.global_batch_size, train.micro_batch_size, ctx.dp.rank, ctx.dp.size, compose=compose) as loader:
        yield assemble(config, ctx, loader, vocab_size)


def _timed(run: Run, steps: int) -> tuple[list[float], list[float]]:
    """(seconds of each step, seconds that each waited for its batch), queued as in training. A step ends when its update ends."""
    seconds: list[float] = []
    waits: list[float] = []

    def note(report: StepReport, spent: float) -> None:
        seconds.append(spent)
        waits.append(report.wait_seconds)

    with Reports(note) as reports:
        for _ in range(steps):
            reports.follow(queue_step(run))
        reports.catch_up()
    return seconds, waits


def _wait(run: Run) -> None:
    if run.ctx.device.type == "cuda":
        torch.cuda.synchronize(run.ctx.device)


def _phases(run: Run, steps: int) -> dict[str, float]:
    """Median seconds of each phase of a step; a step's other work (weights, totals) is in no phase."""
    seen: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for _ in range(steps):
        spent = dict.fromkeys(PHASES, 0.0)
        run.observers = _stopwatch(run, spent)
        train_step(run)
        run.flat.settle()
        for phase, seconds in spent.items():
            seen[phase].append(seconds)
    run.observers = Observers()
    return {phase: statistics.median(values) for phase, values in seen.items()}


def _stopwatch(run: Run, spent: dict[str, float]) -> Observers:
    """Observers that add the seconds of each phase to `spent`, and wait for the device at both ends of each phase."""

    @contextmanager
    def timed(phase: Phase) -> Iterator[None]:
        _wait(run)
        began = time.perf_counter()
        yield
        _wait(run)
        spent[phase] += time.perf_counter() - began

    def observe(instruction: Instruction, began: float, ended: float) -> None:
        _wait(run)  # an instruction includes the device work that it has started
        late = time.monotonic() - ended
        spent["forward" if instruction.kind == "forward" else "backward"] += ended - began + late

    return Observers(observe, timed)


def _profile(run: Run, path: Path | None) -> None:
    """Profile a few steps, which all ranks take, and write a Chrome trace, for chrome://tracing or Perfetto."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if run.ctx.device.type == "cuda" else [])
    with profiled(activities=activities) as profiler:
        for _ in range(PROFILED):
            train_step(run)
        _wait(run)
    if path is not None:
        export_trace(profiler.export_chrome_trace, path)


def export_trace(export: Callable[[str], object], path: Path) -> None:
    """Write a trace and check that it was written, as the profiler does not report a full disk. Raises OSError."""
    with doing("writing", path):
        with path.open("wb"):
            pass  # nor does the profiler report a missing directory
        export(str(path))
        if path.suffix != ".gz" and path.is_file() and not path.read_bytes().rstrip().endswith(b"}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _report(
    run: Run, seconds: Sequence[float], waits: Sequence[float], phases: dict[str, float], session: Session
) -> dict[str, Any]:
    config, vocab_size = run.config, run.chunks[0].build.vocab_size
    model, parallel, train = config.model, config.parallel, config.train
    speed = Speed(
        model_flops_per_token(model, vocab_size),
        hardware_flops_per_token(model, vocab_size, train.recompute),
        session.world.size,
        peak_of_job(session, DTYPES[train.precision], config.log.peak_tflops),
    )
    median = statistics.median(seconds)
    tokens_per_second = train.global_batch_size * model.seq_length / median
    return {
        "tokens_per_second": tokens_per_second,
        "tflops_per_device": speed.tflops_per_device(tokens_per_second),
        "mfu": speed.mfu(tokens_per_second),
        "hfu": speed.hfu(tokens_per_second),
        "memory": peak_memory_bytes(session.device),
        "step_seconds": median,
        "wait_seconds": statistics.median(waits),
        "phases": phases,
        "steps": len(seconds),
        "parameters": parameter_count(model, vocab_size),
        "peak": speed.doubt(tokens_per_second) or speed.peak.note,
        "precision": train.precision,
        "world_size": session.world.size,
        "layout": {
            "tensor_parallel_size": parallel.tensor_parallel_size,
            "sequence_parallel": parallel.sequence_parallel,
            "pipeline_parallel_size": parallel.pipeline_parallel_size,
            "schedule": parallel.schedule,
            "data_parallel_size": run.ctx.dp.size,
            "zero_stage": parallel.zero_stage,
            "zero_ranks": parallel.zero_ranks,
            "reduce_dtype": parallel.reduce_dtype,
        },
        "attention": kernels_of(config, run.ctx.tp.size, DTYPES[train.precision], run.ctx.device).note or None,
        "device": torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def main(path: str, overrides: Sequence[str], steps: int, warmup: int, profile: str | None) -> int:
    """`megatrain bench`: rank 0 prints the line. Returns 0. Raises ConfigError, LaunchError or TransportError."""
    tune_allocator()
    config = load(path, overrides, shapes_of).config
    session = connect(launched(os.environ), config.parallel, config.train.hang_timeout_seconds)
    try:
        report = bench(session, config, steps, warmup, None if profile is None else Path(profile))
        if session.rank == 0:
            sys.stdout.write(json.dumps(report) + "\n")
    finally:
        session.close()
    return 0
