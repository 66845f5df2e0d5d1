"""What rounding is worth in a config: one process again, with every weight changed by one unit in its last place.

Some configs are ill-conditioned: a softmax of large logits, a deep stack of large weights or a large learning rate blow a change of 1e-16
up to 1e-10 and more, in one process as in many. The order of sums, which a layout changes, is such a change; so a layout is held against
what another one, made on purpose, does to the reference (`testing/agree.py`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial

import torch

from megatrain.config.schema import Config
from megatrain.parallel.mesh import ParallelContext
from megatrain.testing.agree import Disagreement, Trace, agree, tolerance
from megatrain.testing.trace import trace_run
from megatrain.training import Run

CONTROLS = 3
"""Runs with other signs, of which the largest deviation counts: that of one may be small by chance."""


def change_last_places(run: Run, seed: int) -> None:
    """Move every weight to the next number above or below, by signs drawn from `seed`; for `prepare`, in one process."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in run.flat.parameters:
            up = torch.randint(0, 2, parameter.shape, generator=generator).bool()
            towards = torch.full_like(parameter, torch.inf).where(up, -torch.inf)
            parameter.copy_(torch.nextafter(parameter, towards))


class Judge:
    """Holds traces of a config's layouts against that of one process, and says what is ill-conditioned in it.

    The control is run when the bounds alone do not do. It hides no fault but small ones of the last update: what blows rounding up does
    the same to a fault, and losses and norms of early steps are held against the control of those steps.
    """

    def __init__(self, config: Config, steps: int) -> None:
        """Train the reference. config: of one process."""
        self.config, self.steps = config, steps
        self.reference = trace_run(ParallelContext.single(), config, steps)

    @cached_property
    def control(self) -> list[Trace]:
        """One process with other weights."""
        changes = [partial(change_last_places, seed=seed) for seed in range(CONTROLS)]
        return [trace_run(ParallelContext.single(), self.config, self.steps, prepare=change) for change in changes]

    def hold(self, trace: Trace, at: int = 0) -> dict[str, float]:
        """Largest deviation of each kind. Raises Disagreement. at: steps that the trace does not have, from the first on."""
        name, reference = self.config.optim.name, last_steps(self.reference, at)
        try:
            return agree(reference, trace, optimizer=name)
        except Disagreement:
            control = [last_steps(of, at) for of in self.control]
            return agree(reference, trace, optimizer=name, control=control)

    def excused(self, deviations: dict[str, float]) -> dict[str, float]:
        """Kind -> the control's deviation, of the kinds of deviation that are rounding in this config alone."""
        allowed = tolerance(self.config.train.precision, self.config.optim.name)
        bounds = dict.fromkeys(("loss", "grad_norm", "gradient"), allowed.step)
        over = [kind for kind, value in deviations.items() if value > bounds.get(kind, allowed.update or 0.0)]
        if not over:
            return {}
        moved = [agree(self.reference, of, optimizer=self.config.optim.name, control=[of]) for of in self.control]
        return {kind: max(of[kind] for of in moved) for kind in over}


def last_steps(trace: Trace, at: int) -> Trace:
    """A trace as that of a run which goes on after `at` steps (0: all)."""
    return replace(trace, losses=trace.losses[at:], grad_norms=trace.grad_norms[at:], gradients={}) if at else trace
