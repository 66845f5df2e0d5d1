"""Who is slow, by times that are made up; what a rank that sleeps looks like to the others, on simulated ranks and in real processes."""

import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jobs
import numpy as np
import pytest
import torch

import megatrain
from megatrain.config.schema import Config, LogConfig, ModelConfig, ParallelConfig, TrainConfig
from megatrain.lifecycle.own_past import medians_of_others
from megatrain.lifecycle.stragglers import Comparison, Stopwatch
from megatrain.parallel.mesh import MeshShape, ParallelContext
from megatrain.testing import simulate
from megatrain.testing.trace import trace_run
from megatrain.training import queue_step
from megatrain.transport import stalls
from megatrain.transport.stalls import HostStalls, StreamStalls
from megatrain.transport.wrappers import RecordedWorld, Recorder
from megatrain.watch import OF_PEERS, slow_note

PIPELINE = [0, 0, 1, 1]


def test_the_median_of_the_others():
    assert medians_of_others(np.array([3.0, 9.0])).tolist() == [9.0, 3.0]
    assert medians_of_others(np.array([5.0, 1.0, 2.0])).tolist() == [1.5, 3.5, 3.0]
    assert medians_of_others(np.array([4.0, 1.0, 2.0, 9.0])).tolist() == [2.0, 4.0, 4.0, 2.0]
    rows = np.random.default_rng(0).random((20, 7))
    assert [medians_of_others(row).tolist() for row in rows] == [
        [np.median(np.delete(row, i)) for i in range(7)] for row in rows
    ]


def told(judge, rows):
    """(interval, rank) of all that are told as slow, and of all told as recovered."""
    paces = [judge(row) for row in rows]
    slow = [(i, rank) for i, pace in enumerate(paces) for rank, _ in pace.slow]
    return slow, [(i, rank) for i, pace in enumerate(paces) for rank in pace.recovered]


def test_a_rank_five_times_slower_is_told_once_after_three_intervals():
    judge = Comparison(PIPELINE, 1.15, 3)
    paces = [judge([0.010, 0.010, 0.030, 0.150]) for _ in range(5)]
    assert [pace.slow for pace in paces] == [(), (), ((3, pytest.approx(5.0)),), (), ()]
    last = paces[-1]
    assert (last.least, last.median, last.most, last.slowest) == (0.010, 0.020, 0.150, 3)
    assert last.ratio == pytest.approx(5.0)


def test_stages_are_not_compared():
    assert told(Comparison(PIPELINE, 1.15, 3), [[0.010, 0.011, 0.050, 0.051]] * 50) == ([], [])
    assert told(Comparison([0, 1, 2], 1.15, 3), [[1.0, 9.0, 1.0]] * 50) == ([], [])
    assert math.isnan(Comparison([0, 1], 1.15, 3)([1.0, 2.0]).ratio)


@pytest.mark.parametrize(("ratio", "slow"), [(1.14, []), (1.16, [(9, 1)]), (1.9, [(9, 1)]), (2.1, [(2, 1)])])
def test_a_little_slower_is_told_once_the_noise_is_known(ratio, slow):
    """Ten intervals tell how much the ratios vary; twice as slow is plain before."""
    assert told(Comparison([0] * 4, 1.15, 3), [[1.0, ratio, 1.0, 1.0]] * 30)[0] == slow


def test_a_rank_that_is_well_again_may_be_told_again():
    rows = [[1.0, 5.0]] * 4 + [[1.0, 1.1]] + [[1.0, 5.0]] * 3
    assert told(Comparison([0, 0], 1.15, 3), rows) == ([(2, 1), (7, 1)], [(4, 1)])
    assert told(Comparison([0, 0], 1.15, 4), [[1.0, 5.0]] * 3 + [[1.0, 1.0]] + [[1.0, 5.0]] * 3) == ([], [])


@pytest.mark.parametrize("ranks", [2, 4, 64])
@pytest.mark.parametrize("noise", [0.02, 0.1, 0.2])
def test_a_noisy_machine_raises_nothing(ranks, noise):
    """Times that vary by so much, independently, for ten thousand steps; and one rank five times slower is told among them."""
    rows = np.exp(noise * np.random.default_rng(ranks).standard_normal((2000, ranks)))
    assert told(Comparison([0] * ranks, 1.15, 3), rows)[0] == []
    rows[:, 1] *= 5
    assert told(Comparison([0] * ranks, 1.15, 3), rows[:30])[0] == [(2, 1)]


def test_an_interval_without_numbers_is_left_out():
    judge = Comparison([0, 0], 1.15, 2)
    assert judge([math.nan, math.nan]) is None
    assert [judge([1.0, 3.0]).slow for _ in range(2)] == [(), ((1, pytest.approx(3.0)),)]


def test_what_is_said():
    log = LogConfig(stragglers_every=5, slow_ratio=1.15, slow_intervals=3)
    assert slow_note(3, "n2", 5.004, OF_PEERS, 0.1234, log) == (
        "rank 3 on n2 is slow: its own work took 123.4 ms a step, 5.00x of its peers, and all others wait for it "
        "(log.slow_ratio=1.15 in 3 intervals of 5 steps)"
    )


# --- waits ------------------------------------------------------------------------------------------------------------------


def test_waits_of_a_step_count_and_those_outside_do_not(monkeypatch):
    clock = iter([1.0, 10.0, 10.5, 20.0])
    monkeypatch.setattr(stalls, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    waits = HostStalls()
    waits.end(waits.begin())  # before the step
    waits.open()
    waits.end(waits.begin())
    seconds = waits.close()
    waits.end(waits.begin())
    assert seconds() == 0.5


def test_on_a_gpu_moments_are_read_after_the_step(monkeypatch):
    class Marked:
        now, asked = 0.0, 0

        def __init__(self, _device):
            self.at = Marked.now

        def seconds_since(self, earlier):
            Marked.asked += 1
            return self.at - earlier.at

    monkeypatch.setattr(stalls, "Moment", Marked)
    waits = StreamStalls(torch.device("cuda"))
    assert waits.begin() is None
    waits.open()
    for seconds in (0.25, 0.5):
        began = waits.begin()
        Marked.now += seconds
        waits.end(began)
    seconds = waits.close()
    assert waits.begin() is None and Marked.asked == 0
    assert seconds() == 0.75


def test_nothing_is_measured_where_nothing_is_compared():
    recorder = Recorder()
    watch = Stopwatch(ParallelContext.single(), recorder, 0, lambda *_: pytest.fail("told"))
    assert [watch.measure(step, lambda: "queued") for step in (1, 2, 3)] == ["queued"] * 3
    watch.finish()
    assert recorder.stalls is None


# --- ranks that sleep ---------------------------------------------------------------------------------------------------------

MODEL = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, seq_length=8, vocab_size=101)


def test_own_times_leave_out_what_others_take_and_change_no_bit():
    """tp 2 x pp 2: rank 2 sleeps in every instruction, and its neighbours wait for it in collectives and receives."""
    parallel = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2, device="cpu")
    train = TrainConfig(global_batch_size=2, micro_batch_size=1, precision="fp32", steps=8)
    config, shape = Config(model=MODEL, train=train, parallel=parallel), MeshShape(tp=2, pp=2)
    recorders = [Recorder() for _ in range(4)]

    def measured(ctx):
        gathered, ended = [], []
        watch = Stopwatch(ctx, recorders[ctx.world.rank], 3, lambda step, seconds: gathered.append((step, seconds)))

        def prepare(run):
            if ctx.world.rank == 2:
                run.observers.instruction = lambda *_: time.sleep(0.01)
            ended.append(run)

        def step(_number, run):
            watch.measure(run.step + 1, lambda: queue_step(run)).report()
            return run

        trace = trace_run(ctx, config, 4, prepare=prepare, between=step)
        watch.finish()
        return gathered, trace.losses, trace.weights

    def plain(ctx):
        def step(_number, run):
            queue_step(run).report()
            return run

        trace = trace_run(ctx, config, 4, between=step)
        return trace.losses, trace.weights

    ranks = simulate(shape, measured, wrap=lambda world: RecordedWorld(world, recorders[world.rank]))
    losses, weights = simulate(shape, plain)[0]
    for gathered, of_rank, held in ranks:
        assert gathered == ranks[0][0] and [step for step, _ in gathered] == [3]
        assert of_rank == losses and all(torch.equal(held[name], weight) for name, weight in weights.items())
    ((_, seconds),) = ranks[0][0]
    assert seconds[2] > 0.04 and max(seconds[:2] + seconds[3:]) < seconds[2] / 2


def slow_run(size, folder, slow, **sections):
    """Train in `size` processes, of which rank `slow` sleeps in each instruction, five times a tiny step; what rank 0 has printed."""
    tree = jobs.tiny(folder.parent / "data", folder, **sections)
    jobs.write_config(folder.with_suffix(".yaml"), tree)
    words, port = [str(Path(__file__).resolve()), str(folder.with_suffix(".yaml")), str(slow)], jobs.free_port()
    with jobs.Job(folder.with_suffix(".job")) as job:
        for rank in range(size):
            job.fork(words, jobs.environment(rank, size, port))
        ended = job.finish()
    assert [(one.code, one.err) for one in ended] == [(0, "")] * size
    return ended[0].out


def sleeping(config, slow):
    """One rank of `slow_run`."""
    job = megatrain.build(config)
    if job.session.rank == slow:
        job.observers.instruction = lambda *_: time.sleep(0.04)
    assert megatrain.train(job)
    job.close()


def check_slow_run(run, said, slow):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    computes = [row for row in rows if "compute_of_step" in row]
    assert [row["compute_of_step"] for row in computes] == [5, 10, 15]
    host = os.uname().nodename
    for row in computes:
        assert (row["slowest_rank"], row["slowest_host"]) == (slow, host) and row["slowest_ratio"] > 2
        assert 0 < row["compute_seconds_min"] <= row["compute_seconds_median"] < row["compute_seconds_max"]
    (event,) = [event for event in jobs.events(run) if event["event"] == "slow"]
    assert (event["rank"], event["host"], event["step"]) == (slow, host, 15)
    assert f"rank {slow} on {host} is slow: its own work took " in said
    assert f"rank {slow} on {host} " in next(line for line in said.splitlines() if line.startswith("step 20/"))
    before = rows.index(computes[-1])
    assert rows[before - 1]["step"] <= 18, "told within twenty steps"


def test_a_sleeping_rank_of_two_is_named(tmp_path):
    jobs.write_store(tmp_path / "data")
    said = slow_run(2, tmp_path / "slow", 1, train={"steps": 20})
    check_slow_run(tmp_path / "slow", said, 1)


if __name__ == "__main__":
    sleeping(sys.argv[1], int(sys.argv[2]))
