"""Gradients that are not finite or too large: all ranks skip the same step, end at the same step, or go back."""

import jobs
import pytest
from breaking import LAYOUTS, MAIN, SAVE_EVERY, STEPS, codes, kinds, lost, said


@pytest.mark.fault(
    injection="one element of one gradient of one rank is {value}, at one step",
    promise="all ranks skip that step, weights and moments untouched to the bit, and count it",
    layout="{layout}",
)
@pytest.mark.parametrize(("layout", "value"), [(MAIN, "nan"), ("dp 2", "inf")])
def test_a_gradient_that_is_not_finite(house, measured, layout, value):
    name = f"nonfinite_{value}"
    run = house.run(name)
    act = {"what": "gradient", "value": value, "at": 7, "ranks": [1]}
    with house.start(layout, name, "checkpoint.save_every=1", act=act) as job:
        ended = job.finish()
    assert codes(ended) == [0] * LAYOUTS[layout].size, said(ended)
    assert jobs.checkpoint_bytes(run, 7) == jobs.checkpoint_bytes(run, 6)
    assert jobs.checkpoint_bytes(run, 8) != jobs.checkpoint_bytes(run, 7)
    rows = jobs.rows(run)
    assert [step for step in rows if rows[step]["skipped"] != rows.get(step - 1, {"skipped": 0})["skipped"]] in ([7], [7, 8])
    assert rows[6] == jobs.rows(house.undisturbed(layout))[6]
    measured.recovered(lost=1)
    assert max(rows) == STEPS


@pytest.mark.fault(
    injection="gradients of one rank are not finite any more, from one step on",
    promise="after train.max_skipped_in_row skipped steps all ranks end with exit code 76, weights untouched",
    layout=MAIN,
)
def test_gradients_that_stay_infinite(house, measured):
    act = {"what": "gradient", "value": "inf", "at": 7, "during": 1000, "ranks": [2]}
    with house.start(MAIN, "infinite", "train.max_skipped_in_row=3", act=act) as job:
        ended = job.finish()
        measured.detected(house.since("infinite"))
    assert codes(ended) == [76] * LAYOUTS[MAIN].size, said(ended)
    assert "3 steps in a row were skipped" in said(ended), said(ended)
    assert max(jobs.rows(house.run("infinite"))) <= 10


@pytest.mark.fault(
    injection="gradients of all ranks are 10,000 times too large at one step, with train.on_spike=rollback",
    promise="the run goes back to the checkpoint before, leaves the samples out and goes on, one time only",
    layout="{layout}",
)
@pytest.mark.parametrize("layout", [MAIN, "dp 2"])
def test_a_spike(house, measured, layout):
    name = f"spike_{layout}".replace(" ", "_")
    run, keys = house.run(name), ("train.on_spike=rollback", "train.spike_history=16", "train.spike_warmup_steps=0")
    act = {"what": "gradient", "factor": 1e4, "at": 21}
    with house.start(layout, name, *keys, "train.steps=28", act=act) as job:
        ended = job.finish()
    assert codes(ended) == [0] * LAYOUTS[layout].size, said(ended)
    assert [event["step"] for event in kinds(run, "spike")] == [21]
    assert len(kinds(run, "rollback")) == 1
    assert max(jobs.rows(run)) == 28
    measured.recovered(lost=lost(run))
    assert 1 <= lost(run) <= SAVE_EVERY + 1
