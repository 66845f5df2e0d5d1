"""Interrupted runs: saved after some steps and continued by a new run, under the same layout or another."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

from megatrain.assembly import assemble
from megatrain.checkpoint.save import Contents, save
from megatrain.config.load import dump
from megatrain.config.schema import Config
from megatrain.optim.portions import portions
from megatrain.parallel.mesh import ParallelContext
from megatrain.resuming.resume import progress_of, restore
from megatrain.testing.agree import Disagreement, Trace
from megatrain.testing.control import Judge
from megatrain.testing.layouts import Layout
from megatrain.testing.trace import trace_run
from megatrain.training import Run


def interrupted(ctx: ParallelContext, config: Config, steps: int, at: int, folder: Path) -> Trace:
    """The trace of `steps` steps in two runs: one takes the first `at` and saves into `folder`, a new one continues."""

    def between(step: int, run: Run) -> Run:
        if step != at:
            return run
        path = save(folder, Contents(at, progress_of(run), dump(config)), portions(run.optimizer), ctx)
        return _from(run, path)

    return trace_run(ctx, config, steps, between=between)


def continued(ctx: ParallelContext, config: Config, steps: int, at: int, path: Path) -> Trace:
    """The trace of steps `at` to `steps`, continued from the checkpoint at `path`; without gradients, which are those of the first step."""
    trace = trace_run(ctx, config, steps - at, between=lambda step, run: run if step else _from(run, path))
    return replace(trace, gradients={})


def _from(run: Run, path: Path) -> Run:
    """A new run of the same config in the state of the checkpoint."""
    fresh = assemble(run.config, run.ctx, run.loader, run.chunks[0].build.vocab_size, objective=run.objective)
    for named in portions(fresh.optimizer).values():
        for portion in named.values():  # elements that are not loaded stay NaN, and so differ
            everything = slice(0, portion.count)
            portion.elements.write(everything, portion.elements.read(everything).fill_(float("nan")))
    restore(fresh, path)
    return fresh


def require_same_bits(one: Trace, other: Trace, what: str) -> None:
    """Raise Disagreement where two traces are not the same to the last bit."""
    for name in ("losses", "grad_norms"):
        if getattr(one, name) != getattr(other, name):
            raise Disagreement(f"{what}: {name} are {getattr(other, name)}, and without an interruption {getattr(one, name)}")
    kinds = {"gradients": (one.gradients, other.gradients), "weights": (one.weights, other.weights)}
    kinds |= {kind: (states, other.states[kind]) for kind, states in one.states.items()}
    for kind, (mine, others) in kinds.items():
        for name, tensor in mine.items():
            if not bool((tensor == others[name]).all()):
                raise Disagreement(f"{what}: {kind} of {name} are not the same bits as without an interruption")


def half_of(steps: int) -> int:
    """Number of steps after which a run is interrupted."""
    return max(1, steps // 2)


class Resumption:
    """Interrupts runs of one config half-way, and compares them with uninterrupted runs."""

    def __init__(self, config: Config, steps: int, precision: str) -> None:
        """Save the checkpoint of one process. config: of one process."""
        self.config, self.steps, self.at, self.precision = config, steps, half_of(steps), precision
        self._folder = Path(mkdtemp(prefix="megatrain-verify-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)  # with this object, or with the process
        self._single = self._folder / "one-process"
        interrupted(ParallelContext.single(), config, steps, self.at, self._single)

    def check(self, layout: Layout, config: Config, run: Callable[..., list[Trace]], judge: Judge | None) -> dict[str, float]:
        """Interrupt the layout's run and return the largest deviation of each kind. Raises Disagreement.

        config: with the layout; run: calls a function with arguments on every rank -> a trace for each. judge: compares with one process;
        None in bfloat16, where the resumed run is only compared with the layout's own uninterrupted run, bit for bit.
        """
        mine = self._folder / str(layout)
        plain, again = run(trace_run, config, self.steps)[0], run(interrupted, config, self.steps, self.at, mine)[0]
        require_same_bits(plain, again, "resumed under its own layout")
        if judge is None:
            return {"loss": 0.0}
        step = f"step_{self.at:08d}"
        back = continued(ParallelContext.single(), self.config, self.steps, self.at, mine / step)
        onward = run(continued, config, self.steps, self.at, self._single / step)[0]
        largest = judge.hold(again)
        for other in (back, onward):
            largest |= {kind: max(value, largest[kind]) for kind, value in judge.hold(other, self.at).items()}
        shutil.rmtree(mine)
        return largest
