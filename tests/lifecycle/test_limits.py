"""When a run stops by itself: times on a clock that is ours, and what SLURM says of a job's end."""

import time
from dataclasses import replace

import pytest

from megatrain.config.schema import TrainConfig
from megatrain.lifecycle import limits
from megatrain.lifecycle.limits import Limits
from megatrain.runtime import slurm
from megatrain.runtime.launch import Launch


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when told to."""
    passed = [0.0]
    began, wall = time.monotonic(), time.time()
    monkeypatch.setattr(limits.time, "monotonic", lambda: began + passed[0])
    monkeypatch.setattr(limits.time, "time", lambda: wall + passed[0])
    return passed


def test_it_stops_so_long_before_the_end(clock):
    end = [time.time() + 3600]
    told = Limits(TrainConfig(exit_before_end_minutes=5.0), Launch(), {}, lambda env: end[0])
    clock[0] = 3290
    assert not told.reached()
    clock[0] = 3301
    assert told.reached() and told.why == "the end of the job's time"


def test_an_extended_job_goes_on(clock):
    end = [time.time() + 3600]
    told = Limits(TrainConfig(), Launch(), {}, lambda env: end[0])
    end[0] += 3600
    clock[0] = 3590
    assert not told.reached()
    clock[0] = 7090
    assert told.reached()


def test_a_clock_that_is_set_back_extends_no_job(clock, monkeypatch):
    end = time.time() + 3600
    told = Limits(TrainConfig(exit_before_end_minutes=5.0), Launch(), {}, lambda env: end)
    monkeypatch.setattr(limits.time, "time", lambda: end - 3600 - 3600)
    clock[0] = 3301
    assert told.reached()


def test_a_short_job_trains_for_half_of_its_time(clock):
    told = Limits(TrainConfig(), Launch(), {}, lambda env: time.time() + 60 - clock[0])
    clock[0] = 29
    assert not told.reached()
    clock[0] = 31
    assert told.reached()


def test_only_rank_0_asks(clock):
    def ask(env):
        raise RuntimeError("asked")

    assert not Limits(TrainConfig(), replace(Launch(), rank=1, world_size=2), {}, ask).reached()
    with pytest.raises(RuntimeError):
        Limits(TrainConfig(), Launch(), {}, ask)


def test_no_end_is_no_limit(clock):
    told = Limits(TrainConfig(), Launch(), {}, lambda env: None)
    clock[0] = 1e9
    assert not told.reached()


@pytest.mark.parametrize(
    ("said", "env", "end"),
    [
        ("JobId=7 EndTime=2026-11-21T20:30:48 Deadline=N/A", {}, "2026-11-21T20:30:48"),
        ("JobId=7 EndTime=Unknown", {}, None),
        ("", {"SLURM_JOB_END_TIME": "1795293048"}, 1795293048.0),
        ("", {"SLURM_JOB_END_TIME": "never"}, None),
        ("", {"SLURM_JOB_END_TIME": "9" * 5000}, None),
    ],
)
def test_the_end_of_a_job(monkeypatch, said, env, end):
    monkeypatch.setattr(slurm, "_ask_controller", lambda *words: said)
    expected = time.mktime(time.strptime(end, "%Y-%m-%dT%H:%M:%S")) if isinstance(end, str) else end
    assert slurm.job_end({"SLURM_JOB_ID": "7", **env}) == expected
    assert slurm.job_end(env) is None
