"""Schedules are legal programs for any number of stages, chunks and micro-batches, and say who sends what to whom."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.parallel.schedules import FAMILIES, Instruction, Message, Schedule, chunks_problem
from megatrain.parallel.simulator import check_program

SHAPES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 5), ("zb_h1", 1), ("zb_v", 2)]


def shown(program):
    letters = {"forward": "F", "backward": "B", "backward_input": "B", "backward_weight": "W"}
    return " ".join(f"{letters[i.kind]}{'' if i.chunk == 0 else 'abcdefgh'[i.chunk]}{i.micro_batch}" for i in program)


@given(shape=st.sampled_from(SHAPES), stages=st.integers(1, 64), micro_batches=st.integers(1, 100), data=st.data())
def test_every_micro_batch_runs_once_on_every_chunk_in_a_legal_order(shape, stages, micro_batches, data):
    schedule = Schedule(shape[0], stages, shape[1], micro_batches)
    stage = data.draw(st.integers(0, stages - 1))
    check_program(schedule, stage, schedule.program(stage))
    only = Schedule(*shape[:1], stages, shape[1], micro_batches, backward=False)
    check_program(only, stage, only.program(stage))


@pytest.mark.parametrize(
    ("name", "stage", "stages", "chunks", "micro_batches", "expected"),
    [
        ("gpipe", 0, 2, 1, 3, "F0 F1 F2 B0 B1 B2"),
        ("1f1b", 0, 1, 1, 3, "F0 B0 F1 B1 F2 B2"),
        ("1f1b", 1, 3, 1, 4, "F0 F1 B0 F2 B1 F3 B2 B3"),
        ("1f1b", 0, 4, 1, 2, "F0 F1 B0 B1"),
        ("zb_h1", 1, 2, 1, 4, "F0 B0 F1 B1 W0 F2 B2 W1 F3 B3 W2 W3"),
        ("interleaved", 0, 2, 2, 4, "F0 F1 Fb0 Fb1 F2 Bb0 F3 Bb1 Fb2 B0 Fb3 B1 Bb2 Bb3 B2 B3"),
        ("interleaved", 0, 2, 2, 1, "F0 Fb0 Bb0 B0"),
        ("zb_v", 0, 1, 2, 2, "F0 Fb0 Bb0 Wb0 F1 B0 W0 Fb1 Bb1 Wb1 B1 W1"),
        ("zb_v", 1, 2, 2, 1, "F0 Fb0 Bb0 Wb0 B0 W0"),
    ],
)
def test_programs_as_their_pictures_show(name, stage, stages, chunks, micro_batches, expected):
    assert shown(Schedule(name, stages, chunks, micro_batches).program(stage)) == expected


@pytest.mark.parametrize(("name", "chunks"), SHAPES)
@pytest.mark.parametrize("stages", [1, 2, 3, 8])
def test_virtual_stages_have_one_home_each(name, chunks, stages):
    schedule = Schedule(name, stages, chunks, 1)
    places = [(stage, chunk) for stage in range(stages) for chunk in range(chunks)]
    assert sorted(schedule.virtual(*place) for place in places) == list(range(stages * chunks))
    assert all(schedule.home(schedule.virtual(*place)) == place for place in places)


def test_the_v_comes_back_to_the_first_stage():
    schedule = Schedule("zb_v", 3, 2, 4)
    assert [schedule.home(v) for v in range(6)] == [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1)]
    assert [Schedule("interleaved", 2, 2, 1).home(v) for v in range(4)] == [(0, 0), (1, 0), (0, 1), (1, 1)]


@given(shape=st.sampled_from(SHAPES), stages=st.integers(1, 9), micro_batches=st.integers(1, 20))
def test_all_that_is_needed_is_made_and_sent_once(shape, stages, micro_batches):
    schedule = Schedule(shape[0], stages, shape[1], micro_batches)
    programs = [schedule.program(stage) for stage in range(stages)]
    needed = [m for s, program in enumerate(programs) for i in program if (m := schedule.needs(s, i)) is not None]
    made = [m for s, program in enumerate(programs) for i in program if (m := schedule.makes(s, i)) is not None]
    assert sorted(needed) == sorted(made) and len(set(made)) == len(made)
    sent = [(s, to, m) for s in range(stages) for to, m in schedule.sent(s)]
    received = [(source, s, m) for s in range(stages) for source, ms in schedule.incoming(s).items() for m in ms]
    assert sorted(sent) == sorted(received)
    assert all(source == schedule.source(m) != to == schedule.home(m.virtual)[0] for source, to, m in sent)
    assert all((to - source) % stages in (1, stages - 1) for source, to, _ in sent), "links join neighbours on the ring"


def test_one_stage_sends_nothing():
    assert list(Schedule("zb_v", 1, 2, 3).sent(0)) == [] and Schedule("interleaved", 1, 3, 3).incoming(0) == {}


def test_messages_are_received_in_the_order_they_are_sent():
    assert Schedule("1f1b", 2, 1, 2).incoming(1) == {0: [Message("activation", 0, 1), Message("activation", 1, 1)]}
    assert Schedule("1f1b", 2, 1, 2).incoming(0) == {1: [Message("gradient", 0, 0), Message("gradient", 1, 0)]}


def test_the_last_weight_gradient_of_each_chunk_is_marked():
    program = Schedule("zb_v", 2, 2, 5).program(0)
    assert [i for i in program if i.last] == [
        Instruction("backward_weight", 4, 1, last=True),
        Instruction("backward_weight", 4, 0, last=True),
    ]


@pytest.mark.parametrize(
    ("name", "chunks", "use"),
    [
        ("1f1b", 2, "=1"),
        ("gpipe", 3, "=1 or parallel.schedule=interleaved"),
        ("interleaved", 1, "=2 or more"),
        ("zb_v", 1, "=2"),
    ],
)
def test_chunks_that_a_schedule_cannot_have_are_refused_with_the_key(name, chunks, use):
    message = f"parallel.schedule={name} cannot have parallel.virtual_pipeline_size={chunks}"
    with pytest.raises(ValueError, match=message + rf"\. Use parallel\.virtual_pipeline_size{use}\."):
        Schedule(name, 2, chunks, 4)
    assert all(chunks_problem(name, family.fewest_chunks) is None for name, family in FAMILIES.items())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [(("1f1b", 0, 1, 1), "0 stages"), (("1f1b", 1, 1, 0), "0 micro-batches"), (("2f2b", 1, 1, 1), "2f2b is none of gpipe")],
)
def test_nonsense_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        Schedule(*arguments)


@pytest.mark.parametrize("stage", [-1, 2])
def test_a_stage_that_is_not_there_is_refused(stage):
    with pytest.raises(ValueError, match=f"no stage {stage} in a pipeline of 2"):
        Schedule("1f1b", 2, 1, 1).program(stage)
