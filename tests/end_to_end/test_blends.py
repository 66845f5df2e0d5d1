"""A run whose weights change and one of whose corpora ends: the same to the bit when it goes on, the same text on any number of ranks."""

import jobs
import pytest

import megatrain
from megatrain.checkpoint.manifest import read_manifest
from megatrain.data.terms import restored
from megatrain.training import train_step

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 10
PLACES = [0, 36, 59]
"""Samples at which the stretches begin: in step 5, and in step 8 of 8 samples each."""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Three corpora, and a config of which one changes its share in the middle of a batch, one ends, and one is seen twice."""
    folder = tmp_path_factory.mktemp("blends")
    for name, documents in (("web", 100), ("code", 10), ("wiki", 3)):
        jobs.write_store(folder / name, documents=documents)
    train = [{"path": f"{folder}/web", "name": "web", "weight": 0.7}, {"path": f"{folder}/wiki", "name": "wiki", "epochs": 2}]
    train.insert(1, {"path": f"{folder}/code", "name": "code", "weight": 0.3, "max_epochs": 1})
    schedule = [{"from_tokens": 36 * 16, "weights": {"web": 0.2, "code": 0.8}}]
    tree = jobs.tiny(
        {"train": train, "schedule": schedule}, folder / "run", train={"steps": STEPS}, checkpoint={"save_every": 4, "keep": 0}
    )
    tree["train"]["micro_batch_size"] = 2
    jobs.write_config(folder / "config.yaml", tree)
    return folder


def test_the_run_is_the_same_on_two_ranks_and_when_it_goes_on(house):
    """The checkpoints of steps 4 and 8 lie before the first change, and behind the second."""
    config = str(house / "config.yaml")

    def words(name, of=None, step=0):
        more = [f"checkpoint.resume={house}/{of}/checkpoints/step_{step:08d}"] if of else []
        return [config, f"log.dir={house}/{name}", *more]

    one = jobs.here(*words("one"))
    assert one.code == 0, one.err
    assert [line[:11] for line in one.out.splitlines() if line.startswith("from step")] == [
        "from step 1",
        "from step 5",
        "from step 8",
    ]
    lines = [["train", *words("two")], ["train", *words("two-again", "two", 4)], ["train", *words("two-last", "one", 8)]]
    assert all(answer.code == 0 for line in jobs.commands(house / "job", lines, size=2) for answer in line)
    assert jobs.here(*words("one-again", "one", 8)).code == 0
    runs = {name: jobs.rows(house / name) for name in ("one", "two", "one-again", "two-again", "two-last")}
    for of, start in (("one", 8), ("two", 4)):
        assert runs[f"{of}-again"] == {step: row for step, row in runs[of].items() if step > start}
        assert jobs.checkpoint_bytes(house / f"{of}-again", STEPS) == jobs.checkpoint_bytes(house / of, STEPS)
    for other in ("two", "two-last"):
        assert [row["loss"] for row in runs[other].values()] == pytest.approx(
            [runs["one"][step]["loss"] for step in runs[other]], rel=1e-5
        )
    terms = restored(read_manifest(house / f"two-again/checkpoints/step_{STEPS:08d}").progress["deal"])
    assert (terms.first, terms.most, terms.even) == (0, (None, 24, 14), (False, False, True))


def test_samples_left_out_across_a_change_of_weights(house):
    """The same samples follow as where they had been left out from the beginning."""
    config = str(house / "config.yaml")
    losses = []
    for left_out_at in (4, 0):
        job = megatrain.build(config, [f"log.dir={house}/left-{left_out_at}"])
        assert [stretch.first for stretch in job.left_out.source.deal.stretches][:3] == PLACES
        taken = [train_step(job).loss for _ in range(left_out_at)]
        job.loader.settle()
        job.left_out.leave_out((32, 40))
        losses.append(taken + [train_step(job).loss for _ in range(6 - left_out_at)])
        job.close()
    assert losses[0] == losses[1]
