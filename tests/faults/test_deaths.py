"""A rank is killed: all ranks end and name it, and the run goes on from its last checkpoint, to the bit."""

import signal
import time

import jobs
import pytest
from breaking import LAYOUTS, MAIN, SAVE_EVERY, STEPS, codes, first_row, lost, said


@pytest.mark.fault(
    injection="kill -9 of rank {victim} in a step",
    promise="all ranks end, the error names the rank; the next start is the undisturbed run, to the bit",
    bound=30,
    layout="{layout}",
)
@pytest.mark.parametrize(("layout", "victim"), [(MAIN, 0), (MAIN, 3), ("dp 2", 0), ("dp 2", 1)])
def test_a_killed_rank_is_named_and_the_run_goes_on(house, measured, layout, victim):
    name = f"killed_{layout}_{victim}".replace(" ", "_")
    run = house.run(name)
    with house.start(layout, name) as job:
        assert jobs.wait_for_rows(job, run, 10)
        job.processes[victim].kill()
        began = time.monotonic()
        ended = job.finish()
    measured.detected(time.monotonic() - began)
    assert codes(ended)[victim] == -signal.SIGKILL
    others = [end for rank, end in enumerate(ended) if rank != victim]
    assert codes(others) == [1] * (LAYOUTS[layout].size - 1), said(ended)
    assert all(f"to blame: rank {victim}\n" in end.err for end in others), said(ended)
    before = jobs.row_count(run)
    with house.start(layout, name) as job:
        seconds = first_row(job, run, before)
        assert codes(job.finish()) == [0] * LAYOUTS[layout].size
    measured.recovered(seconds, lost(run))
    assert lost(run) <= SAVE_EVERY + 1  # a step is recorded when the next one is queued
    jobs.same(run, house.undisturbed(layout), STEPS)
