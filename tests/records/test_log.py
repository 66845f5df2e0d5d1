"""Records of a run: valid JSON, whole lines, Megatron's tags, one view of a resumed run, and no run lost to a full disk."""

import errno
import json
import math
import os
import re
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatrain.records.log import JsonLines, LogDisplay, RunLog, evaluation_lines, step_line
from megatrain.records.rows import ComputeRow, EvaluationRow, StepRow, perplexity, read_metrics
from megatrain.runtime.device_memory import peak_memory_bytes

DRAW = RunLog._draw
"""As users have it; conftest.py leaves it out."""


def row(step, loss=2.3456, **changes):
    values = {
        "token_accuracy": 0.4,
        "grad_norm": 0.8123,
        "learning_rate": 3e-4,
        "tokens": step * 512,
        "tokens_per_second": 1024.0,
        "step_seconds": 0.5,
        "tflops_per_device": 0.25,
        "mfu": 0.412,
        "hfu": 0.5,
        "memory_peak_bytes": 1 << 20,
    }
    return StepRow(step=step, loss=loss, **{**values, **changes})


def evaluation(step, loss=2.0):
    return EvaluationRow(step, loss, 4096, 0.45, step * 512, 0.1)


def open_log(path, every=1, writers=("tensorboard",), watched=False, **changes):
    return RunLog(path, LogDisplay(every, writers, watched), **{"total_steps": 10, "sequence_length": 64, **changes})


def lines(path):
    return [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        for line in path.read_text().splitlines()
    ]


def scalars(directory):
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    points = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert all(len(dict(of)) == len(of) for of in points.values()), "a step has one point"
    return {tag: dict(of) for tag, of in points.items()}


def test_metrics_file_has_the_promised_fields(tmp_path):
    with open_log(tmp_path) as log:
        log.step(row(1))
        assert len(lines(tmp_path / "metrics.jsonl")) == 1  # there at once, not at the end
        log.evaluation(evaluation(1))
    step, valid = lines(tmp_path / "metrics.jsonl")
    promised = (
        "step loss token_accuracy grad_norm learning_rate tokens tokens_per_second step_seconds tflops_per_device mfu hfu"
    )
    assert list(step) == [*promised.split(), "memory_peak_bytes", "skipped", "loss_scale", "wait_seconds", "spike"]
    assert step["loss"] == 2.3456
    assert step["skipped"] is False
    promised = "step valid_loss valid_tokens valid_token_accuracy tokens eval_seconds valid_losses cloze_accuracy"
    assert list(valid) == promised.split()


def test_what_is_not_finite_is_null_and_named(tmp_path):
    with open_log(tmp_path) as log:
        log.step(row(1, math.nan, grad_norm=math.inf, skipped=True))
        log.event("spike", step=1, loss=-math.inf)
    (step,), (event,) = lines(tmp_path / "metrics.jsonl"), lines(tmp_path / "events.jsonl")
    assert step["loss"] is None
    assert step["nonfinite"] == {"loss": "nan", "grad_norm": "inf"}
    assert event["nonfinite"] == {"loss": "-inf"}


def test_events_have_kind_time_step_and_the_rank_at_fault(tmp_path):
    before = datetime.now(timezone.utc) - timedelta(milliseconds=1)
    with open_log(tmp_path) as log:
        log.event("start")
        log.event("hang", step=7, rank=3, axis="tp")
    start, hang = lines(tmp_path / "events.jsonl")
    assert start["event"] == "start"
    assert "rank" not in start
    assert {key: hang[key] for key in ("event", "step", "rank", "axis")} == {
        "event": "hang",
        "step": 7,
        "rank": 3,
        "axis": "tp",
    }
    time = datetime.fromisoformat(hang["time"])
    assert time.utcoffset() == timedelta(0)
    assert re.search(r"\.\d{3}\+", hang["time"])
    assert before <= time <= datetime.now(timezone.utc)


def test_other_ranks_write_events_and_nothing_else(tmp_path, capsys):
    with open_log(tmp_path / "run", rank=1) as log:
        log.step(row(1))
        log.evaluation(evaluation(1))
        log.say("hello")
        log.draw()
        assert not (tmp_path / "run").exists()
        log.event("signal", step=1, rank=1)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["events.jsonl"]
    assert capsys.readouterr() == ("", "")


def test_lines_of_many_writers_stay_whole(tmp_path):
    def write(rank):
        log = open_log(tmp_path, rank=rank)
        for step in range(50):
            log.event("signal", step=step, rank=rank, text="x" * 500)
        log.close()

    writers = [threading.Thread(target=write, args=(rank,)) for rank in range(1, 5)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    seen = lines(tmp_path / "events.jsonl")
    assert sorted((e["rank"], e["step"]) for e in seen) == [(rank, step) for rank in range(1, 5) for step in range(50)]


def test_a_line_cut_short_is_not_glued_to_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "lo')
    file = JsonLines(path)
    file.append({"step": 2, "loss": 4.0})
    file.close()
    assert [r["loss"] for r in read_metrics(path)[0]] == [5.0, 4.0]


def test_last_row_of_a_step_counts_and_a_resume_takes_back_what_follows(tmp_path):
    first = [{"step": s, "loss": 1.0} for s in range(1, 7)]
    first.insert(2, {"step": 2, "valid_loss": 1.0})
    first.append({"step": 6, "valid_loss": 1.0})
    again = [{"step": s, "loss": 2.0} for s in (4, 5)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in first + again) + f'\nno json\n[]\n{{"step": 1e999}}\n{"[" * 100_000}\n')
    steps, evaluations = read_metrics(path)
    assert [(r["step"], r["loss"]) for r in steps] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]
    assert [r["step"] for r in evaluations] == [2]


def test_tensorboard_has_megatrons_tags(tmp_path):
    with open_log(tmp_path, world_size=4) as log:
        log.step(row(3))
        log.evaluation(evaluation(3))
    seen = scalars(tmp_path / "tensorboard")
    over_both = {
        "lm loss": 2.3456,
        "learning-rate": 3e-4,
        "grad-norm": 0.8123,
        "lm loss validation": 2.0,
        "lm loss validation ppl": math.e**2,
    }
    expected = {tag: {3: value} for tag, value in over_both.items()} | {
        f"{tag} vs samples": {24: value} for tag, value in over_both.items()
    }
    expected |= {
        tag: {3: value}
        for tag, value in {
            "batch-size": 8,
            "world-size": 4,
            "iteration-time": 0.5,
            "throughput": 0.25,
            "mem-max-allocated-bytes": 1 << 20,
        }.items()
    }
    assert seen.keys() == expected.keys()
    for tag, points in expected.items():
        assert seen[tag] == pytest.approx(points, rel=1e-6), tag


def test_own_times_of_ranks_are_in_every_record(tmp_path, capsys):
    compute = ComputeRow(5, 0.101, 0.104, 0.1205, 3, "n2", 1.1586)
    with open_log(tmp_path) as log:
        log.step(row(5))
        log.compute(compute)
        log.step(row(6))
    steps = [{**vars(row(step))} for step in (5, 6)]
    fields = ("min", 0.101), ("median", 0.104), ("max", 0.1205)
    slowest = {"slowest_rank": 3, "slowest_host": "n2", "slowest_ratio": 1.1586}
    own = {"compute_of_step": 5, **{f"compute_seconds_{name}": seconds for name, seconds in fields}, **slowest}
    assert lines(tmp_path / "metrics.jsonl") == [steps[0], own, steps[1]]
    seen = scalars(tmp_path / "tensorboard")
    assert {tag: points[5] for tag, points in seen.items() if tag.startswith(("compute", "slowest"))} == pytest.approx(
        {f"compute-time/{name}": seconds for name, seconds in fields} | {"slowest-ratio": 1.1586, "slowest-rank": 3}
    )
    said = capsys.readouterr().out.splitlines()
    assert "compute" not in said[0] and said[1].endswith(" | compute (ms): 101.0 to 120.5, rank 3 on n2 1.16x |")
    alone = step_line(row(6), 10, ComputeRow(5, 0.1, 0.1, 0.2, 1, "n2", math.nan))
    assert alone.endswith(" | compute (ms): 100.0 to 200.0 |"), "no stage has two ranks"
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")[0]] == [5, 6]


def test_tensorboard_of_a_resumed_run_is_that_of_an_uninterrupted_one(tmp_path):
    def run(path, first, last, loss):
        with open_log(path, start_step=first - 1) as log:
            for step in range(first, last + 1):
                log.step(row(step, loss(step)))
                if step % 5 == 0:
                    log.evaluation(evaluation(step, loss(step)))

    run(tmp_path / "whole", 1, 40, lambda s: 50.0 - s)
    run(tmp_path / "cut", 1, 33, lambda s: 50.0 - s if s <= 20 else -1.0)
    run(tmp_path / "cut", 21, 40, lambda s: 50.0 - s)
    assert scalars(tmp_path / "cut" / "tensorboard") == scalars(tmp_path / "whole" / "tensorboard")


@pytest.mark.parametrize("to", [0, 2])
@pytest.mark.parametrize("how", ["in the run", "in a new start", "with a clock that was set back"])
def test_tensorboard_of_a_run_that_went_back_is_that_of_one_that_did_not(tmp_path, monkeypatch, how, to):
    log = open_log(tmp_path / "back")
    for step in (1, 2, 3, 4):
        log.step(row(step, loss=9.0 if step > to else 2.0))
    if how == "in the run":
        log.went_back(to)
    else:
        log.close()
        if how == "with a clock that was set back":
            monkeypatch.setattr(time, "time_ns", lambda: 10**15)
        log = open_log(tmp_path / "back", start_step=to)
    for step in range(to + 1, 5):
        log.step(row(step, loss=2.0))
    log.close()
    with open_log(tmp_path / "straight") as log:
        for step in (1, 2, 3, 4):
            log.step(row(step, loss=2.0))
    assert scalars(tmp_path / "back" / "tensorboard") == scalars(tmp_path / "straight" / "tensorboard")


def test_tensorboard_only_where_asked(tmp_path):
    with open_log(tmp_path, writers=()) as log:
        log.step(row(1))
    assert not (tmp_path / "tensorboard").exists()


def test_console_line_has_the_promised_shape():
    start = "step 200/1000 | loss: 2.3456E+00 | grad norm: 0.812 | learning rate: 3.000E-04 | tokens/s: 1024 | "
    assert step_line(row(200), 1000) == start + "step time (ms): 500.0 | TFLOP/s per device: 0.250 | mfu: 41.2% |"
    assert "mfu" not in step_line(row(200, mfu=None), 1000)
    assert step_line(row(200, math.nan, skipped=True), 1000).endswith("| skipped |")


def test_evaluation_lines():
    rule, line, end = evaluation_lines(evaluation(1000)).split("\n")
    assert (
        line
        == "validation loss at step 1000 | lm loss value: 2.000000E+00 | lm loss PPL: 7.389056E+00 | token accuracy: 45.00% |"
    )
    assert rule == end == "-" * len(line)
    assert perplexity(1e9) == math.exp(20)


def test_console_shows_every_nth_the_ends_and_what_went_wrong(tmp_path, capsys):
    with open_log(tmp_path, every=4) as log:
        for step in range(1, 11):
            log.step(row(step, math.nan if step == 6 else 1.0, skipped=step == 7))
    out, err = capsys.readouterr()
    assert [int(line.split()[1].split("/")[0]) for line in out.splitlines()] == [1, 4, 6, 7, 8, 10]
    assert err == ""
    assert "\x1b" not in out


def test_bar_goes_to_stderr_and_lines_to_a_redirected_stdout(tmp_path, capsys):
    with open_log(tmp_path, watched=True) as log:
        log.step(row(1))
    out, _ = capsys.readouterr()
    assert out == step_line(row(1), 10) + "\n"


@pytest.mark.parametrize("every", [0, -1])
def test_every_must_be_a_number_of_steps(tmp_path, every):
    with pytest.raises(ValueError, match=r"log\.every"):
        open_log(tmp_path, every=every)


def test_a_directory_that_cannot_be_written_is_an_error_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"log\.dir=.*cannot be written.*Set log\.dir to"):
        open_log(tmp_path / "file" / "run")


def test_a_full_disk_costs_one_warning_and_no_run(tmp_path, capsys, monkeypatch):
    real, room = os.write, {"bytes": 10**9}

    def write(file, data):
        if room["bytes"] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = real(file, bytes(data)[: room["bytes"]])
        room["bytes"] -= taken
        return taken

    monkeypatch.setattr(os, "write", write)
    with open_log(tmp_path) as log:
        log.step(row(1))
        room["bytes"] = 30  # the next line is cut short, the one after not written at all
        log.step(row(2))
        log.step(row(3))
        room["bytes"] = 10**9
        log.step(row(4))
    err = capsys.readouterr().err
    assert err.count("metrics.jsonl of") == 1
    assert err.count("tensorboard of") == 1
    assert "No space left" in err
    assert "training goes on" in err
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")[0]] == [1, 4]
    assert list(scalars(tmp_path / "tensorboard")["lm loss"]) == [1, 4]


def test_draw_makes_the_picture_and_survives_what_cannot_be_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(RunLog, "_draw", DRAW)
    with open_log(tmp_path) as log:
        log.step(row(1))
        log.draw({"unigram": 3.0})
        assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        (tmp_path / "loss.png").unlink()
        (tmp_path / "loss.png").mkdir()
        log.draw()
        log.draw()
    assert capsys.readouterr().err.count("loss.png of") == 1


def test_closing_twice_is_fine_and_a_late_event_still_arrives(tmp_path):
    log = open_log(tmp_path)
    log.close()
    log.close()
    log.event("end", step=10)
    log.close()
    assert [e["event"] for e in lines(tmp_path / "events.jsonl")] == ["end"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_the_high_water_mark_of_the_process_in_bytes():
    held = bytes(64 << 20)
    status = Path("/proc/self/status").read_text()
    high_water = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    assert len(held) < peak_memory_bytes("cpu") == pytest.approx(high_water, rel=0.05)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
@pytest.mark.parametrize("make", [Path.symlink_to, lambda path, to: os.mkfifo(path)], ids=["link", "fifo"])
def test_no_log_is_written_through_a_link_or_waits_for_a_fifo(tmp_path, name, make):
    (tmp_path / "victim").write_text("precious")
    make(tmp_path / name, tmp_path / "victim")
    what = f"a link, to {tmp_path}/victim" if (tmp_path / name).is_symlink() else "no plain file"
    said = f"log.dir={tmp_path} cannot be written ({tmp_path}/{name} is {what}, and a run writes there alone what is its own."
    with pytest.raises(OSError, match="^" + re.escape(said)):
        open_log(tmp_path, writers=())
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_link_put_in_the_place_of_a_log_during_the_run_costs_a_warning(tmp_path, capsys):
    (tmp_path / "victim").write_text("precious")
    with open_log(tmp_path, writers=()) as log:
        for name in ("metrics.jsonl", "summary.json"):
            (tmp_path / name).unlink(missing_ok=True)
            (tmp_path / name).symlink_to(tmp_path / "victim")
        log.step(row(1))
        log.write("summary.json", {"a": 1})
    assert (tmp_path / "victim").read_text() == "precious"
    assert f"{tmp_path}/summary.json is a link, to {tmp_path}/victim" in capsys.readouterr().err


def test_what_a_checkpoint_or_another_host_says_moves_no_cursor(tmp_path, capsys):
    with RunLog(tmp_path, LogDisplay(writers=()), total_steps=1, sequence_length=8) as log:
        log.say("changed since then: torch: 2.13\x1b[2J\r -> 2.14\nnext, 中")
        log.say("x" * 30_000)
    said = capsys.readouterr().out
    assert said.startswith("changed since then: torch: 2.13\\x1b[2J\\r -> 2.14\nnext, 中\n")
    assert len(said) < 20_200 and said.endswith("x ... and 10000 letters more\n")
