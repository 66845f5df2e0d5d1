"""A poisoned document in the text: told of, its updates left out, or gone back from, by a run alone; and runs that end because of it."""

import json
import os
from pathlib import Path

import jobs
import poisoned
import pytest
from poisoned import Poisoned

import megatrain
from megatrain.checkpoint.manifest import read_manifest
from megatrain.lifecycle.spikes import Diverged
from megatrain.lifecycle.stop import DIVERGED, StopRequest
from megatrain.runtime.reports import Caution
from megatrain.training import train_step
from megatrain.watch import part_norms

pytestmark = pytest.mark.usefixtures("one_thread")

SPIKE = 18
"""The first step whose batch has a piece of the poisoned document."""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp("poisoned")
    poisoned.write_store(folder / "data", poisoned.DOCUMENT)
    return folder


def tree(house, run, on_spike, **sections):
    train = {"steps": 24, "on_spike": on_spike} | sections.pop("train", {})
    if on_spike == "rollback":
        train = {"spike_warmup_steps": 4} | train
    return jobs.tiny(house / "data", run, **{"train": train, "checkpoint": {"save_every": 5}, **sections})


def train(config, stop=None, poison=Poisoned):
    """A run to its end, and what it wrote: (whether it finished, its rows in order, events by kind)."""
    job = megatrain.build(config, objective=poison())
    try:
        done = megatrain.train(job, stop)
    finally:
        job.close()
    return done, *written(config["log"]["dir"])


def written(run):
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    events = {}
    for event in jobs.events(Path(run)):
        events.setdefault(event["event"], []).append(event)
    return rows, events


class StopAt(StopRequest):
    """A request that comes at its step-th call."""

    def __init__(self, step):
        super().__init__()
        self.asked, self.step = 0, step

    def __bool__(self):
        self.asked += 1
        return self.asked >= self.step


@pytest.fixture(scope="module")
def gone_back(house):
    """The rows and events of a run that went back."""
    return train(tree(house, house / "back", "rollback"))


def test_a_spike_is_told_of_with_its_document(house, tmp_path):
    done, rows, events = train(tree(house, tmp_path, "warn"))
    assert done and [row["step"] for row in rows if row["spike"]] == [SPIKE] and not any(row["skipped"] for row in rows)
    (spike,) = events["spike"]
    assert spike["step"] == SPIKE and spike["samples"] == [136, 144]
    loss, median, limit = spike["values"]["loss"]
    assert (loss, median) == (rows[SPIKE - 1]["loss"], pytest.approx(4.6, abs=0.1)) and median < limit < 6 < loss
    first = {"file": f"{house}/data.bin", "document": 30, "offset": 1200, "tokens": 9}
    assert spike["documents"][0] == first
    assert json.loads((tmp_path / "spikes/step_00000018.json").read_text())["documents"][0] == first


def test_skip_leaves_out_the_update(house, tmp_path):
    done, rows, _ = train(tree(house, tmp_path, "skip"))
    assert done and [row["step"] for row in rows if row["skipped"]] == [SPIKE]
    listed = train(tree(house, tmp_path / "listed", "warn", train={"skip_steps": [SPIKE]}))[1]
    assert [row["loss"] for row in listed] == [row["loss"] for row in rows]


def test_a_run_goes_back_leaves_out_the_samples_and_goes_on(house, gone_back):
    done, rows, events = gone_back
    assert done and [row["step"] for row in rows] == [*range(1, SPIKE + 2), *range(16, 25)]
    (back,), (left_out,) = events["rollback"], events["skip_data"]
    assert (back["step"], back["to"], back["checkpoint"]) == (SPIKE, 15, f"{house}/back/checkpoints/step_00000015")
    assert left_out["samples"] == [8 * 15, 8 * SPIKE]
    assert left_out["documents"][0] == {"file": f"{house}/data.bin", "document": 30, "offset": 1200, "tokens": 9}
    after = rows[SPIKE + 1 :]
    assert all(row["loss"] < 5 for row in after), "the poison is gone"
    assert [row["tokens"] for row in after] == [8 * 16 * step for step in range(16, 25)]
    before = {row["step"]: row["learning_rate"] for row in rows[:SPIKE]}
    assert [after[n]["learning_rate"] / before[16 + n] for n in range(3)] == pytest.approx([0.25, 0.5, 0.75])
    progress = read_manifest(house / "back/checkpoints/step_00000024").progress
    assert progress["left_out"] == [[120 * 16, 144 * 16]] and progress["spikes"]["retries"] == 1


def test_what_it_goes_on_with_is_what_the_samples_behind_the_window_make(house, tmp_path, gone_back):
    """The same steps, with the samples left out by hand."""
    job = megatrain.build(tree(house, tmp_path, "warn"), objective=Poisoned())
    reports = [train_step(job) for _ in range(15)]
    job.loader.close()
    job.left_out.leave_out((120, 144))
    job.caution = lambda step: Caution(min(1.0, (step - 15) / 4))
    reports += [train_step(job) for _ in range(9)]
    job.close()
    rows = gone_back[1][:15] + gone_back[1][SPIKE + 1 :]
    assert [(report.loss, report.grad_norm) for report in reports] == [(row["loss"], row["grad_norm"]) for row in rows]


@pytest.mark.parametrize("stop", [SPIKE, SPIKE + 3])
def test_a_run_that_is_stopped_before_or_after_it_goes_back_is_the_same(house, tmp_path, gone_back, stop):
    config = tree(house, tmp_path / "run", "rollback")
    assert not train(config, StopAt(stop))[0]
    done, rows, _ = train(config)
    assert done

    def last(of):
        return {row["step"]: (row["loss"], row["grad_norm"], row["learning_rate"]) for row in of}

    assert last(rows) == last(gone_back[1])


def test_the_embedding_gradient_is_shrunk(house, tmp_path):
    norms = []
    for factor in (1.0, 0.1):
        config = tree(
            house, tmp_path, "warn", model={"tied_embeddings": False, "position": "rope"}, train={"precision": "fp64"}
        )
        job = megatrain.build(config)
        job.caution = lambda step, factor=factor: Caution(embedding_grad=factor)
        job.observers.before_update.append(lambda run: norms.append(part_norms(run.flat, run.ctx, run.loss_scale.scale)))
        train_step(job)
        job.close()
    plain, shrunk = ({part: gradient for part, (gradient, _) in of.items()} for of in norms)
    assert shrunk == pytest.approx({**plain, "embedding": shrunk["embedding"]}, rel=1e-12)
    assert shrunk["embedding"] == pytest.approx(0.1 * plain["embedding"], rel=1e-12)


def test_only_the_steps_before_the_spike_are_left_out_where_asked(house, tmp_path):
    _, rows, events = train(tree(house, tmp_path, "rollback", train={"spike_window": 2, "steps": 20}))
    (left_out,) = events["skip_data"]
    assert left_out["samples"] == [8 * 16, 8 * SPIKE]
    again = [row["token_accuracy"] for row in rows if row["step"] == 16]
    assert len(again) == 2 and again[0] == again[1], "step 16 has the batch that it had"


def test_retries_end_and_the_error_says_where_to_look(house, tmp_path):
    config = tree(house, tmp_path, "rollback", train={"spike_retries": 0})
    said = r"^step 18: loss .*, and after 0 rollbacks .*, train.spike_retries=0 allows no other. Look at document 30 of .*data.bin, its 9 "
    with pytest.raises(Diverged, match=said) as error:
        train(config)
    assert str(error.value).endswith(f"the last checkpoint is {tmp_path}/checkpoints/step_00000015")
    (event,) = written(tmp_path)[1]["diverged"]
    assert event["message"] == str(error.value) and event["documents"][0]["document"] == 30
    assert json.loads((tmp_path / DIVERGED).read_text())["step"] == SPIKE


def test_the_command_ends_with_76_where_every_step_is_skipped(tmp_path):
    """A learning rate that makes weights NaN: ten steps, not all sixty."""
    jobs.write_store(tmp_path / "data")
    given = jobs.tiny(
        tmp_path / "data", tmp_path / "run", optim={"lr": 1e15, "min_lr": 0.0, "clip_grad": 0.0}, train={"steps": 60}
    )
    config = jobs.write_config(tmp_path / "config.yaml", given)
    (ended,) = jobs.train(tmp_path / "job", str(config))
    assert ended.code == os.EX_PROTOCOL == 76
    (line,) = ended.err.splitlines()
    assert "10 steps in a row were skipped, and train.on_spike=warn does not go back (rollback would)" in line
    rows, events = written(tmp_path / "run")
    assert len(events["diverged"]) == len(events["skipped"]) == 1 and len(rows) < 20
    assert events["skipped"][0]["message"] == f"step {events['skipped'][0]['step']} was skipped: loss nan, gradient norm nan"
    assert not (tmp_path / "run/preempted").exists()


def test_a_checkpoint_is_there_to_go_back_to_from_the_first_step_on(house, tmp_path):
    """Also beside the checkpoints of another run, which are not its own."""
    for steps in (3, 19):
        config = tree(
            house,
            tmp_path,
            "rollback",
            train={"steps": steps, "spike_retries": 4},
            checkpoint={"save_every": 0, "resume": "never"},
        )
        done, _, events = train(config)
    assert done and [back["to"] for back in events["rollback"]] == [0, 0, 0, 0], "four batches, as many tries"
    assert events["skip_data"][0]["samples"] == [0, 8 * SPIKE]
