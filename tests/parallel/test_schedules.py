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


@given(shape=st.sampled_from(SHAPES), stages=st.integers(1, 9), micro_batches=st.integers(1, 20), backward=st.booleans())
def test_all_that_is_needed_is_made_and_sent_once(shape, stages, micro_batches, backward):
    schedule = Schedule(shape[0], stages, shape[1], micro_batches, backward)
    programs = [schedule.program(stage) for stage in range(stages)]
    needed = [i.needs for program in programs for i in program if i.needs is not None]
    made = [i.gives for program in programs for i in program if i.gives is not None]
    assert sorted(needed) == sorted(made) and len(set(made)) == len(made) == (1 + backward) * micro_batches * (
        schedule.virtual_stages - 1
    )
    assert all(i.needs.to == s for s, p in enumerate(programs) for i in p if i.needs is not None)
    assert all(i.gives.source == s for s, p in enumerate(programs) for i in p if i.gives is not None)
    assert all(m.to == schedule.home(m.virtual)[0] for m in made)
    assert all((m.to - m.source) % stages in (0, 1, stages - 1) for m in made), "links join neighbours on the ring"


@given(shape=st.sampled_from(SHAPES), stages=st.integers(1, 9), micro_batches=st.integers(1, 20))
def test_receives_are_posted_one_instruction_ahead_in_the_order_of_the_sender(shape, stages, micro_batches):
    schedule = Schedule(shape[0], stages, shape[1], micro_batches)
    programs = [schedule.program(stage) for stage in range(stages)]
    for stage, program in enumerate(programs):
        posted = []
        for place, instruction in enumerate(program):
            posted += instruction.receives
            soon = [i.needs for i in program[place : place + 2] if i.needs is not None and i.needs.source != stage]
            assert set(soon) <= set(posted) and (not instruction.receives or instruction.receives[-1] in soon)
        for source, other in enumerate(programs):
            sent = [i.gives for i in other if i.gives is not None and i.gives.to == stage != source]
            assert sent == [message for message in posted if message.source == source]


def test_one_stage_sends_nothing():
    for schedule in (Schedule("zb_v", 1, 2, 3), Schedule("interleaved", 1, 3, 3)):
        assert not any(i.receives for i in schedule.program(0))
        assert {(m.source, m.to) for i in schedule.program(0) for m in (i.needs, i.gives) if m is not None} == {(0, 0)}


def test_instructions_carry_what_they_need_and_what_they_give():
    first, second = (Message("activation", m, 1, source=0, to=1) for m in (0, 1))
    back = [Message("gradient", m, 0, source=1, to=0) for m in (0, 1)]
    assert Schedule("1f1b", 2, 1, 2).program(0) == (
        Instruction("forward", 0, gives=first),
        Instruction("forward", 1, gives=second, receives=(back[0],)),
        Instruction("backward", 0, needs=back[0], receives=(back[1],)),
        Instruction("backward", 1, last=True, needs=back[1]),
    )
    assert Schedule("1f1b", 2, 1, 2).program(1) == (
        Instruction("forward", 0, needs=first, receives=(first,)),
        Instruction("backward", 0, gives=back[0], receives=(second,)),
        Instruction("forward", 1, needs=second),
        Instruction("backward", 1, last=True, gives=back[1]),
    )
    assert str(Schedule("1f1b", 2, 1, 2).program(1)[2]) == "forward of micro-batch 1 on chunk 0"


def test_the_last_weight_gradient_of_each_chunk_is_marked():
    program = Schedule("zb_v", 2, 2, 5).program(0)
    marked = [(i.kind, i.micro_batch, i.chunk) for i in program if i.last]
    assert marked == [("backward_weight", 4, 1), ("backward_weight", 4, 0)]


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
