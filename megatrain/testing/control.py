"""Controls: how much a config amplifies rounding, measured by one process whose weights are changed by one unit in the last place.

Some configs are ill-conditioned: a softmax of large logits, a deep stack of large weights or a large learning rate amplifies a change of
1e-16 to 1e-10 and more, on one process as on many. A layout changes the order of sums, which is such a change. So deviations of a layout
are compared with those that such a change of weights causes in the reference (`testing/agree.py`).
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
"""Control runs with different random signs; the largest deviation counts, as one run's may be small by chance."""


def change_last_places(run: Run, seed: int) -> None:
    """Move every weight to the next number above or below, with signs drawn from `seed`. For `prepare` of `trace_run`, on one process."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in run.flat.parameters:
            up = torch.randint(0, 2, parameter.shape, generator=generator).bool()
            towards = torch.full_like(parameter, torch.inf).where(up, -torch.inf)
            parameter.copy_(torch.nextafter(parameter, towards))


class Judge:
    """Compares traces of a config's layouts with that of one process, and reports amplified rounding.

    The control runs only when the bounds are exceeded. It can hide only small faults of the last update: what amplifies rounding amplifies
    a fault as well, and losses and norms of early steps are compared with the control's in those steps.
    """

    def __init__(self, config: Config, steps: int) -> None:
        """Train the reference. config: of one process."""
        self.config, self.steps = config, steps
        self.reference = trace_run(ParallelContext.single(), config, steps)

    @cached_property
    def control(self) -> list[Trace]:
        """Traces of one process with weights changed in their last place."""
        changes = [partial(change_last_places, seed=seed) for seed in range(CONTROLS)]
        return [trace_run(ParallelContext.single(), self.config, self.steps, prepare=change) for change in changes]

    def hold(self, trace: Trace, at: int = 0) -> dict[str, float]:
        """Compare a trace with the reference; returns the largest deviation of each kind. Raises Disagreement.

        at: number of steps done before the trace begins.
        """
        name, reference = self.config.optim.name, last_steps(self.reference, at)
        try:
            return agree(reference, trace, optimizer=name)
        except Disagreement:
            control = [last_steps(of, at) for of in self.control]
            return agree(reference, trace, optimizer=name, control=control)

    def excused(self, deviations: dict[str, float]) -> dict[str, float]:
        """For kinds of deviation that exceed the bounds and passed only by the control: kind -> the control's deviation."""
        allowed = tolerance(self.config.train.precision, self.config.optim.name)
        bounds = dict.fromkeys(("loss", "grad_norm", "gradient"), allowed.step)
        over = [kind for kind, value in deviations.items() if value > bounds.get(kind, allowed.update or 0.0)]
        if not over:
            return {}
        moved = [agree(self.reference, of, optimizer=self.config.optim.name, control=[of]) for of in self.control]
        return {kind: max(of[kind] for of in moved) for kind in over}


def last_steps(trace: Trace, at: int) -> Trace:
    """The trace without its first `at` steps, as a run has it that resumed there (0: unchanged)."""
    return replace(trace, losses=trace.losses[at:], grad_norms=trace.grad_norms[at:], gradients={}) if at else trace
