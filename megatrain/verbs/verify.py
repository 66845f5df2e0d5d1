"""`megatrain verify` tests that the same seed and data train the same model under every layout.

One process trains a few steps. Then other layouts do, on simulated ranks (threads) or gloo processes, and everything that layouts
must agree on is compared (`testing/agree.py`, docs/numerics.md): losses, gradient norms, first gradients, weights, states.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import chain
from math import lcm
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatrain.assembly import require_schedule
from megatrain.config.budget import warmup_steps
from megatrain.config.load import load
from megatrain.config.schema import Config
from megatrain.config.source import ConfigError
from megatrain.config.validate import require_effects, validate_step
from megatrain.files import whole
from megatrain.init_from import shapes_of
from megatrain.parallel.mesh import ParallelContext
from megatrain.program import vocabulary
from megatrain.records.progress import person_watching
from megatrain.runtime.flops import parameter_count
from megatrain.testing import Disagreement, simulate, spawn
from megatrain.testing.agree import MARGIN, Trace, agree_in_bf16
from megatrain.testing.control import Judge
from megatrain.testing.layouts import Layout, batch_unit, changed_batches, covering, every_layout, for_replicas, shrunk
from megatrain.testing.resumed import Resumption, half_of
from megatrain.testing.trace import round_weights, trace_run
from megatrain.testing.worker import end_with_parent

Precision = Literal["fp64", "fp32", "bf16"]

LARGEST_WORLD = 8
PROCESSES_AT_LEAST = 24
"""At least this many of the layouts of `--layouts all` also run on gloo processes."""
SEEDS = 12
"""Number of runs, each with its own seed, for a comparison in bfloat16 (docs/numerics.md)."""
LARGE = 20_000_000
"""From this number of parameters on, a config is too large for many layouts on one machine."""
SECONDS = 300.0
"""Time limit of one layout."""


@dataclass
class Row:
    """Result of one layout."""

    layout: str
    where: Literal["threads", "processes"]
    seconds: float
    deviations: dict[str, float] = field(default_factory=dict)
    """Largest deviation of each kind: loss, grad_norm, gradient, weight, state."""
    problem: str = ""
    """The first difference; "" if all agrees."""
    note: str = ""
    """The deviations of layout and control, if both exceed the bounds; else ""."""


class Verifier:
    """Runs layouts of one config and compares them with one process."""

    def __init__(self, config: Config, steps: int, precision: Precision, resume: bool = False) -> None:
        """Train the reference, on one process. config: its layout is ignored; resume: save every run half-way and continue it."""
        optim = replace(config.optim, warmup_steps=min(warmup_steps(config), 1))
        train = replace(config.train, steps=max(steps, 2), precision=precision)
        exact = config.parallel if precision == "bf16" else replace(config.parallel, reduce_dtype="fp32")
        self.config = Layout().apply(replace(config, optim=optim, train=train, parallel=exact))
        self.steps, self.precision = steps, precision
        self._resume = Resumption(self.config, steps, precision) if resume else None
        self._alone = [self._reference(seed) for seed in range(SEEDS)] if precision == "bf16" else []
        self.judge = None if self._alone else Judge(self.config, steps)

    def _reference(self, seed: int) -> tuple[Trace, Trace]:
        """Traces of the first step of one process in float32 and in bfloat16, from the same weights."""
        ctx, bf16 = ParallelContext.single(), self._seeded(self.config, seed)
        exact = replace(bf16, train=replace(bf16.train, precision="fp32"))
        return trace_run(ctx, exact, 1, prepare=round_weights), trace_run(ctx, bf16, 1)

    def _seeded(self, config: Config, seed: int) -> Config:
        return replace(config, train=replace(config.train, seed=config.train.seed + seed))

    def check(self, layout: Layout, processes: bool = False) -> dict[str, float]:
        """Largest deviation of each kind. Raises Disagreement, or the error that ended a run."""
        config = layout.apply(self.config)
        if processes:
            config = _fewer_micro_batches(config, layout)
        if self._resume is not None:
            return self._resume.check(layout, config, partial(self._run, layout, processes=processes), self.judge)
        if self.judge is None:
            return self._check_bf16(layout, config, processes)
        traces = self._run(layout, lean_trace, config, self.steps, processes=processes)
        largest: dict[str, float] = {}
        for trace in (trace for trace in traces if trace.weights):
            for kind, value in self.judge.hold(trace).items():
                largest[kind] = max(largest.get(kind, 0.0), value)
        _same_on_all_ranks(traces)
        return largest

    def note(self, deviations: dict[str, float]) -> str:
        """A note on deviations that exceed the bounds although `check` passed (`Judge.excused`); "" if none do."""
        moved = {} if self.judge is None else self.judge.excused(deviations)
        figures = ", ".join(f"{kind} {deviations[kind]:.1e} beside {value:.1e}" for kind, value in moved.items())
        return f"ill-conditioned: {figures} by a change of one process's weights in their last place" if moved else ""

    def _run(self, layout: Layout, work: Callable[..., Trace], *given: Any, processes: bool) -> list[Trace]:
        run = spawn if processes else simulate
        return run(layout.shape, work, *given, timeout_seconds=SECONDS)

    def _check_bf16(self, layout: Layout, config: Config, processes: bool) -> dict[str, float]:
        others = []
        for seed in range(SEEDS):
            traces = self._run(layout, lean_trace, self._seeded(config, seed), 1, processes=processes)
            _same_on_all_ranks(traces)
            others.append(traces[0])
        agree_in_bf16([exact for exact, _ in self._alone], [alone for _, alone in self._alone], others)
        if layout.master == "split":
            whole = replace(layout, master="fp32")
            ours, theirs = (
                self._run(way, lean_trace, way.apply(self.config), self.steps, processes=processes)[0]
                for way in (layout, whole)
            )
            if (ours.losses, ours.grad_norms) != (theirs.losses, theirs.grad_norms):
                raise Disagreement(
                    f"optim.master=split gives the losses {ours.losses}, and optim.master=fp32 {theirs.losses}: not the same bits"
                )
        worst = max(abs(o.losses[0] - a.losses[0]) / abs(a.losses[0]) for o, (_, a) in zip(others, self._alone, strict=True))
        return {"loss": worst}


def _fewer_micro_batches(config: Config, layout: Layout) -> Config:
    """The config with larger micro-batches, about as many as the pipeline has stages, since messages between processes are slow."""
    micro, share = config.train.micro_batch_size, batch_unit(config.train) // layout.dp
    fixed = config.data.drawn_per_micro_batch
    while not fixed and share // micro > max(2, layout.pp) and share % (2 * micro) == 0:
        micro *= 2
    return replace(config, train=replace(config.train, micro_batch_size=micro))


def lean_trace(ctx: ParallelContext, config: Config, steps: int) -> Trace:
    """The trace of one rank; tensors only on one rank of each replica, as its other ranks have the same."""
    trace = trace_run(ctx, config, steps)
    if ctx.tp.rank == ctx.pp.rank == 0:
        return trace
    return replace(trace, gradients={}, weights={}, states={})


def _same_on_all_ranks(traces: Sequence[Trace]) -> None:
    """Raise Disagreement if two ranks report different bits."""
    for what in ("losses", "grad_norms"):
        for rank, trace in enumerate(traces):
            for step, (mine, first) in enumerate(zip(getattr(trace, what), getattr(traces[0], what), strict=True)):
                if mine != first and not (math.isnan(mine) and math.isnan(first)):
                    raise Disagreement(f"step {step}, {what}: rank {rank} reports {mine!r}, rank 0 {first!r}")


def comparable(config: Config, layouts: str) -> Config:
    """The config that all of the layouts train (`for_replicas`). Raises ConfigError for names that are no layouts."""
    if layouts == "all":
        return for_replicas(config, LARGEST_WORLD)
    return for_replicas(config, lcm(*(layout.dp for layout in _layouts_named(layouts))))


def _layouts_named(layouts: str) -> list[Layout]:
    try:
        chosen = [Layout.parse(name.strip()) for name in layouts.split(",") if name.strip()]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not chosen:
        raise ConfigError("--layouts names none. Use --layouts all, or names such as tp2,pp2-zb_h1,dp2-zero3.")
    return chosen


def plan_rows(
    config: Config, layouts: str, precision: Precision, processes: bool
) -> tuple[list[tuple[Layout, bool]], list[str]]:
    """(layout, on processes) in the order to run, and the reasons why layouts of `all` are left out. Raises ConfigError for an illegal
    LIST.
    """
    if layouts != "all":
        chosen = _layouts_named(layouts)
        for layout in chosen:
            if problem := layout.problem(config):
                raise ConfigError(f"--layouts {layout}: {problem}")
        return [(layout, processes) for layout in chosen], []
    everything = list(every_layout(LARGEST_WORLD, ("fp32", "split") if precision == "bf16" else ("fp32",)))
    legal = [layout for layout in everything if not layout.problem(config)]
    reasons = [f"{layout}: {layout.problem(config)}" for layout in everything if layout not in set(legal)]
    if processes:
        return [(layout, True) for layout in legal], reasons
    return [(layout, False) for layout in legal] + [(layout, True) for layout in _pairs(legal)], reasons


def _pairs(legal: Sequence[Layout]) -> list[Layout]:
    """Layouts to run on processes, of two ranks and more: they cover every pair of values, and are at least PROCESSES_AT_LEAST."""
    many = [layout for layout in legal if layout.shape.world > 1]
    if not many:
        return []
    columns = {_columns(layout): layout for layout in many}
    chosen = [columns[point] for point in covering(list(columns), strength=2)]
    missing = max(0, PROCESSES_AT_LEAST - len(chosen))
    rest = [layout for layout in many if layout not in set(chosen) and layout.shape.world <= 4]
    return chosen + rest[:: max(1, len(rest) // max(missing, 1))][:missing]


def _columns(layout: Layout) -> tuple[Any, ...]:
    return tuple(vars(layout).values())


def verify(
    config: Config,
    layouts: str = "all",
    steps: int = 5,
    precision: Precision = "fp64",
    processes: bool = False,
    resume: bool = False,
    tell: Callable[[Row, int, int], None] = lambda row, done, total: None,
) -> list[Row]:
    """Train `config` under many layouts and compare each with one process; one row a layout, in the order in which they ran.

    layouts: `all`, or names joined by commas. resume: every run is also saved half-way and continued, under its own layout to the bit, and
    from it to one process and back. tell: called with every row, the number of rows so far, and their total.
    Raises ConfigError for a layout that the config cannot have.
    """
    config = comparable(config, layouts)
    planned, _ = plan_rows(config, layouts, precision, processes)
    check = partial(row_of, config, steps, precision, resume)
    rows: list[Row] = []
    with ExitStack() as stack:
        results: Iterable[Row] = map(check, planned)
        if (workers := min(os.cpu_count() or 1, len(planned))) > 1 and not processes:
            # Simulated ranks share one interpreter's lock, and so one core: a process for each core.
            pool = ProcessPoolExecutor(workers, get_context("spawn"), _end_with, (os.getpid(),))
            stack.callback(pool.shutdown, cancel_futures=True)
            on_threads = [pair for pair in planned if not pair[1]]
            results = chain(pool.map(check, on_threads), map(check, [pair for pair in planned if pair[1]]))
        for row in results:
            rows.append(row)
            tell(row, len(rows), len(planned))
    return rows


def _end_with(parent: int) -> None:
    """End this worker when the process that started it ends, in whatever way."""
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()


@lru_cache(maxsize=1)
def _verifier(config: Config, steps: int, precision: Precision, resume: bool) -> Verifier:
    return Verifier(config, steps, precision, resume)


def row_of(config: Config, steps: int, precision: Precision, resume: bool, layout: tuple[Layout, bool]) -> Row:
    """Check one (layout, on processes)."""
    row = Row(str(layout[0]), "processes" if layout[1] else "threads", 0.0)
    verifier, began = _verifier(config, steps, precision, resume), time.monotonic()
    try:
        row.deviations = verifier.check(*layout)
        row.note = verifier.note(row.deviations)
    except Disagreement as error:
        row.problem = str(error)
    except Exception as error:  # an error of one layout must not hide the others
        row.problem = f"{type(error).__name__}: {error}"
    row.seconds = time.monotonic() - began
    return row


# --- the verb -------------------------------------------------------------------------------------------------------------


def prepared(path: str, overrides: Sequence[str], shrink: bool) -> Config:
    """The config of a file, with its vocabulary size filled in; with `shrink`, a small one. Raises ConfigError."""
    config = load(path, overrides, shapes_of).config
    require_effects(config)
    config = replace(config, model=replace(config.model, vocab_size=vocabulary(config)))
    if shrink:
        config = shrunk(config)
    alone = Layout().apply(config)
    validate_step(alone, 1)
    require_schedule(alone)
    return config


class VerifyOptions(NamedTuple):
    """The options of `megatrain verify`."""

    layouts: str
    steps: int
    precision: Precision
    processes: bool
    shrink: bool
    resume: bool
    report: Path | None


def main(path: str, overrides: Sequence[str], options: VerifyOptions) -> int:
    """`megatrain verify`: exit code 0 where every layout agrees, 1 otherwise."""
    layouts, steps, precision, processes, shrink, resume, report = options
    config = prepared(path, overrides, shrink)
    if resume and steps < 2:
        raise ConfigError(f"--resume interrupts a run half-way, and --steps {steps} has no half. Use --steps 2 or more.")
    given, config = config, comparable(config, layouts)
    planned, left_out = plan_rows(config, layouts, precision, processes)
    if config != given:
        print(f"micro-batches are part of the data of data.objective={config.data.objective}: {changed_batches(given, config)}")
    size = parameter_count(config.model, config.model.vocab_size or 0)
    print(
        f"{len(planned)} layouts, {steps} steps each in {precision}, of {size:,} parameters "
        f"({sum(not on for _, on in planned)} on simulated ranks, {sum(on for _, on in planned)} on processes)"
    )
    if resume:
        print(
            f"each is saved after {half_of(steps)} steps and gone on with by a new run: under its own layout, and to and from one process"
        )
    if size > LARGE:
        print("this is a large model for so many runs on one machine: --shrink verifies a small one of the same structure")
    if left_out:
        print(f"{len(left_out)} layouts are not legal for this config, such as {left_out[0]}")
    with _table() as tell:
        rows = verify(config, layouts, steps, precision, processes, resume, tell)
    failed = [row for row in rows if row.problem]
    _summarise(rows, failed)
    if report is not None:
        with whole(report, text=True) as file:
            json.dump({"steps": steps, "precision": precision, "rows": [vars(row) for row in rows]}, file, indent=1)
    return 1 if failed else 0


@contextmanager
def _table() -> Iterator[Callable[[Row, int, int], None]]:
    """A function that prints one line for each layout as it ends, above a progress bar on a terminal."""
    began = time.monotonic()
    print(f"{'layout':40} {'ranks':9} {'loss':>8} {'norm':>8} {'gradient':>8} {'weight':>8} {'state':>8}")

    def line(row: Row) -> str:
        values = [row.deviations.get(kind) for kind in ("loss", "grad_norm", "gradient", "weight", "state")]
        numbers = " ".join(f"{'-' if value is None else format(value, '.1e'):>8}" for value in values)
        verdict = f"FAILED: {row.problem}" if row.problem else f"{numbers}  ok{' *' if row.note else ''}"
        return f"{row.layout:40} {row.where:9} {verdict}"

    if not person_watching() or find_spec("rich") is None:

        def tell(row: Row, done: int, total: int) -> None:
            left = (time.monotonic() - began) / done * (total - done)
            print(f"{line(row)}  {done}/{total}, {_minutes(left)} left", flush=True)

        yield tell
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr, highlight=False)) as bar:
        task = bar.add_task("verify", total=None)

        def show(row: Row, done: int, total: int) -> None:
            bar.console.print(line(row), markup=False, highlight=False, soft_wrap=True)
            bar.update(task, completed=done, total=total)

        yield show


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _summarise(rows: Sequence[Row], failed: Sequence[Row]) -> None:
    for kind in ("loss", "grad_norm", "gradient", "weight", "state"):
        worst = max((row for row in rows if kind in row.deviations), key=lambda row: row.deviations[kind], default=None)
        if worst is not None:
            print(f"worst {kind}: {worst.deviations[kind]:.3g} ({worst.layout}, {worst.where})")
    for row in rows:
        if row.note:
            print(f"* {row.layout} on {row.where}: {row.note}")
    if any(row.note for row in rows):
        print(
            f"* agree, as far as this config can tell: up to {MARGIN} times what rounding alone makes is no fault here, and smaller faults "
            "are not seen. Fewer --steps, a smaller model.init_std or optim.lr show more."
        )
    for row in failed:
        print(f"FAILED {row.layout} on {row.where}: {row.problem}")
    print(f"{len(rows) - len(failed)} of {len(rows)} layouts agree with one process")
