"""The loop tells of a step when the next one is queued, and before anything else; nothing is lost or out of order by that."""

import json

import jobs
import pytest

import megatrain
from megatrain.lifecycle.stop import StopRequest
from megatrain.watch import Watch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder with training data and held-out data."""
    folder = tmp_path_factory.mktemp("late")
    jobs.write_store(folder / "data")
    jobs.write_store(folder / "held_out", documents=9)
    return folder


def built(house, folder, **sections):
    data = {"train": str(house / "data"), "valid": str(house / "held_out")}
    return megatrain.build(jobs.tiny(data, folder / "run", **sections))


@pytest.fixture(scope="module")
def undisturbed(house):
    """A run of 8 steps; evaluations change nothing."""
    job = built(house, house)
    assert megatrain.train(job)
    job.close()
    return house / "run"


class StopAt(StopRequest):
    """A request that comes when it is asked for a number of times: once a step, and once a batch of an evaluation."""

    def __init__(self, ask):
        super().__init__()
        self.asked, self.ask = 0, ask

    def __bool__(self):
        self.asked += 1
        return self.asked >= self.ask


def order(run):
    """The rows of metrics.jsonl, in order: steps, norms before an update, evaluations."""
    names = {"loss": "step", "norms_of_step": "norms", "valid_loss": "evaluation"}
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kind = next(name for name in names if name in row)
        found.append(f"{names[kind]} {row['norms_of_step' if kind == 'norms_of_step' else 'step']}")
    return found


def test_lines_stay_in_order(house, tmp_path):
    job = built(
        house,
        tmp_path,
        train={"eval_every": 2, "audit_every": 3, "steps": 5},
        checkpoint={"save_every": 3, "asynchronous": False},
        log={"norms_every": 4},
    )
    told, rows = [], []
    watch_save, watch_step = Watch.save, Watch.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "step", lambda watch, *given: (rows.append((given[0].step, job.step)), watch_step(watch, *given)))
        patch.setattr(Watch, "save", lambda watch, **how: (told.append((job.step, rows[-1][0])), watch_save(watch, **how)))
        assert megatrain.train(job)
    job.close()
    steps = ["step 1", "step 2", "evaluation 2", "step 3", "norms 4", "step 4", "evaluation 4", "step 5", "evaluation 5"]
    assert order(tmp_path / "run") == steps
    assert rows == [(1, 2), (2, 2), (3, 3), (4, 4), (5, 5)], (
        "step 1 is told of when 2 is queued, the others before what follows"
    )
    assert told == [(3, 3), (5, 5)], "what a checkpoint has was told of before it is saved"


@pytest.mark.parametrize(
    ("ask", "eval_every", "ends"),
    [
        (3, 0, 4),  # the third step carries the wish, which is known when the fourth is queued
        (3, 3, 3),  # known at once where the third is waited for
        (4, 3, 3),  # the fourth to ask is the evaluation after the third step, which is left
    ],
)
def test_a_stop_ends_the_run_where_it_is_known(house, undisturbed, tmp_path, ask, eval_every, ends):
    plan = {"eval_every": eval_every, "steps": 8}
    stopped = built(house, tmp_path, train=plan)
    assert not megatrain.train(stopped, StopAt(ask))
    stopped.close()
    run = tmp_path / "run"
    assert order(run) == [f"step {step}" for step in range(1, ends + 1)]
    assert (run / "checkpoints/latest").read_text().strip() == f"step_{ends:08d}"
    assert json.loads((run / "preempted").read_text())["step"] == ends
    again = built(house, tmp_path, train=plan)
    assert again.step == ends and megatrain.train(again)
    again.close()
    jobs.same(run, undisturbed, 8)


def test_an_error_in_a_step_loses_no_row_of_those_before(house, tmp_path):
    job = built(house, tmp_path)
    build = job.loader.build

    def broken(consumed):
        if consumed == 3 * 8:
            raise OSError("the disk has gone")
        return build(consumed)

    job.loader.build = broken
    with pytest.raises(OSError, match="the disk has gone"):
        megatrain.train(job)
    job.close()
    assert order(tmp_path / "run") == ["step 1", "step 2", "step 3"]
