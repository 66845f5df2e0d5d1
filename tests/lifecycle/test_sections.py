"""Where a run is and how long it may be there: on a clock that is ours."""

from typing import get_args

import pytest

from megatrain.lifecycle import sections
from megatrain.lifecycle.sections import Limit, SectionLimits, Sections, Suspensions

LIMITS = SectionLimits(start=100.0, hang=10.0, save=50.0)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when told to."""
    passed = [1000.0]
    monkeypatch.setattr(sections.time, "monotonic", lambda: passed[0])
    return passed


def test_every_section_has_a_limit_of_its_own():
    limits = {name: LIMITS.of(name) for name in get_args(sections.Name)}
    assert {name: (limit.seconds, limit.key) for name, limit in limits.items()} == {
        "set-up": (100.0, "train.start_timeout_seconds"),
        "data": (10.0, "train.hang_timeout_seconds"),
        "step": (10.0, "train.hang_timeout_seconds"),
        "evaluation": (10.0, "train.hang_timeout_seconds"),
        "samples": (10.0, "train.hang_timeout_seconds"),
        "tasks": (10.0, "train.hang_timeout_seconds"),
        "save": (50.0, "checkpoint.timeout_seconds"),
        "records": (10.0, "train.hang_timeout_seconds"),
        "end": (10.0, "train.hang_timeout_seconds"),
    }


def test_the_innermost_section_is_measured_and_the_one_around_begins_anew(clock):
    of = Sections(LIMITS)
    assert of.now() is None and of.limit() is None
    with of.enter("step"):
        clock[0] += 9
        with of.enter("save", lambda: "/run/step_7/weights"):
            assert (str(of.now()), of.now().since, of.limit().seconds) == ("save at /run/step_7/weights", 1009.0, 50.0)
            clock[0] += 40
        assert (str(of.now()), of.now().since, of.limit().seconds) == ("step", 1049.0, 10.0)
        clock[0] += 3
        of.tick()
        assert of.now().since == 1052.0
    assert of.now() is None


def test_a_section_is_left_by_an_error_too(clock):
    of = Sections(LIMITS)
    with pytest.raises(ValueError), of.enter("step"), of.enter("data"):
        raise ValueError
    assert of.now() is None


def test_once_told_to_stop_a_section_may_take_five_times_its_usual_time_or_half_a_minute(clock):
    of = Sections(SectionLimits(start=100.0, hang=600.0, save=700.0))
    with of.enter("step"):
        assert of.limit(told=True) == Limit(600.0, "train.hang_timeout_seconds"), "the first step's usual time is not known"
        clock[0] += 2
        of.tick()
        assert of.limit(told=True) == Limit(30.0, "train.hang_timeout_seconds", told=True)
        clock[0] += 20
        of.tick()
        clock[0] += 1
        of.tick()
        assert of.limit(told=True).seconds == 100.0 and of.limit().seconds == 600.0
        with of.enter("save"):
            clock[0] += 1
            of.tick()
            assert of.limit(told=True).seconds == 700.0, "how long a whole save takes is not known before the first"
            of.longest_save = lambda: 4.0
            assert of.limit(told=True) == Limit(30.0, "checkpoint.timeout_seconds", told=True)
            of.longest_save = lambda: 40.0
            assert of.limit(told=True).seconds == 200.0 and of.limit().seconds == 700.0
            of.longest_save = lambda: 400.0
            assert of.limit(told=True) == Limit(700.0, "checkpoint.timeout_seconds")


def test_a_suspension_is_not_counted_once_a_section_has_begun():
    of = Suspensions()
    assert of.since(0.0) == 0.0
    of.add(100.0, 60.0)
    of.add(200.0, 30.0)
    assert [of.since(begin) for begin in (0.0, 70.0, 100.0, 190.0, 200.0)] == [90.0, 60.0, 30.0, 10.0, 0.0]
