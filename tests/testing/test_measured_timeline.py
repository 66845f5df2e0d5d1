"""The executor on real processes takes the time that the simulator says."""

import pytest

from megatrain.parallel.schedules import Schedule
from megatrain.parallel.simulator import simulate
from megatrain.testing.measured_timeline import measured_timeline

pytestmark = pytest.mark.alone

TRIES = 3
"""Of which the quickest counts: what else the machine does can only make a run slower."""


SOME = [("1f1b", 1), ("zb_v", 2)]
"""One chunk, and two with weight gradients put off."""
OTHERS = [("gpipe", 1), ("interleaved", 2), ("zb_h1", 1)]  # the other workers wait meanwhile


@pytest.mark.parametrize(("name", "chunks"), [*SOME, *(pytest.param(*shape, marks=pytest.mark.slow) for shape in OTHERS)])
def test_four_gloo_stages_of_equal_cost_take_the_simulated_time(name, chunks):
    schedule = Schedule(name, 4, chunks, 8)
    paper = simulate(schedule)
    for _ in range(TRIES):
        real = measured_timeline(schedule, unit_seconds=0.04)
        if real.makespan <= 1.1 * paper.makespan:
            break
    assert paper.makespan <= real.makespan <= 1.1 * paper.makespan
    for on_paper, measured in zip(paper.stages, real.stages, strict=True):
        assert [e.instruction[:3] for e in measured] == [e.instruction[:3] for e in on_paper]
    assert real.step_bubble == pytest.approx(paper.step_bubble, abs=0.08)
