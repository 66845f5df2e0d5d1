"""Every schedule ends under the strictest transport, keeps no more than its paper says, and is idle as long as its formula says."""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.parallel.schedules import FAMILIES, Instruction, Schedule
from megatrain.parallel.simulator import Costs, ScheduleError, check_program, peak_saved, simulate

SHAPES = ("gpipe", "1f1b", "interleaved", "zb_h1", "zb_v")


def chunks_of(name, wanted):
    return {"interleaved": max(2, wanted), "zb_v": 2}.get(name, 1)


def paper_bound(name, stage, p, v, m):
    """Saved states, of one micro-batch on one chunk each."""
    return {
        "gpipe": m,
        "1f1b": min(m, p - stage),
        "interleaved": min(m * v, 2 * (p - 1 - stage) + (v - 1) * p + 1),
        "zb_h1": min(m, p),
        "zb_v": min(2 * m, 2 * p),
    }[name]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(SHAPES),
    stages=st.integers(1, 64),
    wanted=st.integers(2, 8),
    micro_batches=st.integers(1, 512),
    latency=st.sampled_from([0.0, 0.3]),
)
def test_no_deadlock_exact_counts_and_no_more_than_the_papers_memory(name, stages, wanted, micro_batches, latency):
    chunks = chunks_of(name, wanted)
    micro_batches = max(1, min(micro_batches, 2_500 // (stages * chunks)))  # simulated in a twentieth of a second
    schedule = Schedule(name, stages, chunks, micro_batches)
    timeline = simulate(schedule, Costs(communication=latency))
    kinds = 3 if name.startswith("zb") else 2
    for stage, events in enumerate(timeline.stages):
        assert len(events) == kinds * chunks * micro_batches
        assert all(a.end <= b.start for a, b in pairwise(events))
        assert timeline.peak(stage) <= paper_bound(name, stage, stages, chunks, micro_batches)


@pytest.mark.parametrize(
    ("name", "chunks", "micro_batches"),
    [
        ("zb_v", 2, 128),  # twice as many as stages: it fills and drains
        pytest.param("zb_v", 2, 512, marks=pytest.mark.slow),
        pytest.param("interleaved", 8, 512, marks=pytest.mark.slow),
    ],
)
def test_the_largest_pipeline(name, chunks, micro_batches):
    timeline = simulate(Schedule(name, 64, chunks, micro_batches))
    assert max(map(timeline.peak, range(64))) <= paper_bound(name, 0, 64, chunks, micro_batches)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("p", [1, 2, 4, 7])
@pytest.mark.parametrize("times", [2, 3, 5])
def test_step_bubbles_are_those_of_the_formulas(name, p, times):
    m, v = p * times, chunks_of(name, 3)
    timeline = simulate(Schedule(name, p, v, m))
    exact = {
        "gpipe": Fraction(p - 1, m + p - 1),
        "1f1b": Fraction(p - 1, m + p - 1),
        "interleaved": Fraction(p - 1, v * m + p - 1),
        "zb_h1": Fraction(p - 1, 3 * m + p - 1),
        "zb_v": Fraction(p - 1, 6 * m + p - 1),
    }[name]
    assert timeline.step_bubble == pytest.approx(float(exact), abs=1e-12)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
def test_zb_v_has_no_device_bubble_and_1f1bs_memory(p):
    timeline = simulate(Schedule("zb_v", p, 2, 2 * p))
    assert [timeline.device_bubble(stage) for stage in range(p)] == pytest.approx([0.0] * p, abs=1e-12)
    assert [timeline.peak(stage) for stage in range(p)] == [2 * p] * p, (
        "2p chunks of half a stage: p micro-batches, as 1F1B's first"
    )


def test_1f1b_by_hand():
    """Two stages, two micro-batches: stage 0 waits 3 units between its forwards and its first backward, 1 before its second."""
    timeline = simulate(Schedule("1f1b", 2, 1, 2))
    clock = [[(e.instruction.kind, e.instruction.micro_batch, e.start, e.end) for e in events] for events in timeline.stages]
    assert clock == [
        [("forward", 0, 0, 1), ("forward", 1, 1, 2), ("backward", 0, 4, 6), ("backward", 1, 7, 9)],
        [("forward", 0, 1, 2), ("backward", 0, 2, 4), ("forward", 1, 4, 5), ("backward", 1, 5, 7)],
    ]
    assert timeline.makespan == 9 and timeline.step_bubble == pytest.approx(1 / 3)
    assert [timeline.device_bubble(0), timeline.device_bubble(1)] == pytest.approx([1 / 3, 0.0])
    assert [timeline.peak(0), timeline.peak(1)] == [2, 1]


def test_costs_of_each_virtual_stage_and_of_messages():
    costs = Costs(forward=(1.0, 2.0), backward_input=(3.0, 4.0), backward_weight=(5.0, 6.0), communication=0.5)
    timeline = simulate(Schedule("1f1b", 2, 1, 1), costs)
    assert [(e.start, e.end) for events in timeline.stages for e in events] == [(0, 1), (14, 22), (1.5, 3.5), (3.5, 13.5)]


def test_a_transfer_begins_when_the_receiver_has_posted_it():
    """Stage 1 is busy with micro-batch 0 until 12, and has posted what its next two instructions need: not micro-batch 2."""
    timeline = simulate(Schedule("gpipe", 2, 1, 3), Costs(forward=(1.0, 10.0), communication=2.0))
    assert [e.start for e in timeline.stages[1][:3]] == [3, 13, 23]
    slow = simulate(Schedule("gpipe", 2, 1, 3), Costs(forward=(1.0, 1.0), communication=5.0))
    assert [e.start for e in slow.stages[1][:3]] == [6, 11, 16], "one after the other on one channel"


def test_evaluation_runs_forwards_alone_and_keeps_nothing():
    for name in SHAPES:
        timeline = simulate(Schedule(name, 4, chunks_of(name, 2), 8, backward=False))
        assert {e.instruction.kind for events in timeline.stages for e in events} == {"forward"}
        assert timeline.peak(0) == 0


GOOD = [("forward", 0), ("backward", 0), ("forward", 1), ("backward", 1, 0, True)]


@pytest.mark.parametrize(
    ("program", "match"),
    [
        ([("backward", 0), *GOOD], "after nothing"),
        ([("forward", 0), *GOOD], "after forward"),
        (GOOD[:2], "not run to their end"),
        ([*GOOD[:3], ("backward_input", 1)], "not run to their end"),
        ([*GOOD[:3], ("backward", 1)], "must mark its last"),
        ([GOOD[0], ("backward", 0, 0, True), *GOOD[2:]], "must mark its last"),
    ],
)
def test_illegal_programs_are_found(program, match):
    with pytest.raises(ScheduleError, match=match):
        check_program(Schedule("1f1b", 1, 1, 2), 0, [Instruction(*i) for i in program])


def test_a_deadlock_is_found_and_says_who_waits_for_whom(monkeypatch):
    first, second = [("forward", 1), ("backward", 1), ("forward", 0), ("backward", 0)], GOOD
    crossed = FAMILIES["1f1b"]._replace(program=lambda stage, *_: [Instruction(*i) for i in (first, second)[stage]])
    monkeypatch.setitem(FAMILIES, "crossed", crossed)
    waits = "stage 0 waits for stage 1 before backward of micro-batch 1 on chunk 0; stage 1 waits for stage 0 before forward of"
    with pytest.raises(ScheduleError, match=f"deadlocks: {waits} micro-batch 0"):
        simulate(Schedule("crossed", 2, 1, 2))


def test_a_send_out_of_order_is_found(monkeypatch):
    real = Schedule.program

    def swapped(self, stage):
        program = list(real(self, stage))
        if stage == 0:
            program[:2] = program[1::-1]
        return program

    monkeypatch.setattr(Schedule, "program", swapped)
    with pytest.raises(ScheduleError, match=r"stage 0 sends .*micro_batch=1.* out of order: stage 1 receives .*micro_batch=0"):
        simulate(Schedule("gpipe", 2, 1, 2))


def test_the_most_that_a_program_keeps():
    assert peak_saved(Schedule("gpipe", 2, 1, 2).program(0)) == 2
