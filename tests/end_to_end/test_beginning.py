"""Where a run goes on: from what it has saved itself, whatever checkpoint.resume says, and at first from where that says that it begins."""

import shutil
from dataclasses import replace
from pathlib import Path

import jobs
import pytest
import torch

import megatrain
from megatrain.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from megatrain.checkpoint.together import CheckpointError
from megatrain.config.load import dump, from_dict
from megatrain.parallel.mesh import MeshShape
from megatrain.resuming.beginning import OwnCheckpoints, beginning_of
from megatrain.resuming.changed import values_then
from megatrain.runtime.launch import Launch

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Data, and a finished run with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("beginning")
    jobs.write_store(folder / "data")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the tests: with more, sums are rounded otherwise
    try:
        assert start(folder, "old", stop=False)[0].step == STEPS
    finally:
        torch.set_num_threads(threads)
    return folder


def start(house, run, resume="auto", *, stop=True, weights_only=False, **optim):
    """(job, where it began) of a start that is told to stop after one step, unless that is the last."""
    train = {"steps": STEPS} | ({"exit_after_minutes": 1e-4} if stop else {})
    checkpoint = {"save_every": 1, "keep": 0, "resume": str(resume)} | ({"weights_only": True} if weights_only else {})
    job = megatrain.build(jobs.tiny(house / "data", house / run, train=train, checkpoint=checkpoint, optim=optim))
    try:
        began = job.step
        megatrain.train(job)
        return job, began
    finally:
        job.close()


def saved(house, run, step):
    return house / run / f"checkpoints/step_{step:08d}"


def test_from_a_path_it_begins_and_then_goes_on_from_its_own(house):
    path = saved(house, "old", 1)
    job, began = start(house, "path", path)
    assert (began, job.step, job.resumed_from) == (1, 2, path)
    assert job.notes == [f"the run begins from {path}"]
    job, began = start(house, "path", path)
    assert (began, job.step, job.resumed_from) == (2, 3, saved(house, "path", 2))
    assert job.notes == [
        f"checkpoint.resume={path}, and {saved(house, 'path', 2)} is this run's own, which began from {path}: it goes on from there. "
        "To begin there again, set checkpoint.dir to another directory"
    ]
    assert start(house, "path", path)[1] == 3
    assert start(house, "path", path)[1] == 4  # and there is nothing to do any more
    rows = jobs.rows(house / "path")
    assert rows == {step: row for step, row in jobs.rows(house / "old").items() if step > 1}


def test_another_path_is_another_beginning_and_a_copy_is_the_same_one(house):
    copy = house / "copy" / "step_00000001"
    shutil.copytree(saved(house, "old", 1), copy)
    assert start(house, "moved", saved(house, "old", 1))[1] == 1
    assert start(house, "moved", copy)[1] == 2
    shutil.rmtree(copy)
    assert start(house, "moved", saved(house, "old", 1))[1] == 3
    job, began = start(house, "moved", saved(house, "old", 2))
    assert began == 2
    assert job.notes[1] == f"step_00000004 is not this run's: its run began from {saved(house, 'old', 1)}"
    assert start(house, "moved", saved(house, "old", 2))[1] == 3


def test_a_path_that_is_gone_is_not_needed_any_more(house):
    path = house / "gone" / "step_00000002"
    shutil.copytree(saved(house, "old", 2), path)
    assert start(house, "without", path)[1] == 2
    shutil.rmtree(path)
    assert start(house, "without", path)[1] == 3
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no manifest\.json"):
        start(house, "nothing", path)


def test_a_run_goes_back_in_its_own_directory(house):
    shutil.copytree(house / "old", house / "back")
    path = saved(house, "back", 1)
    assert start(house, "back", path, lr=2e-2)[1] == 1
    assert start(house, "back", path, lr=2e-2)[1] == 2  # step 2 is its own now; 3 and 4 are of before
    assert start(house, "back", "auto", lr=2e-2)[1] == 3  # the newest
    assert start(house, "back", saved(house, "back", 2), lr=2e-2)[1] == 2  # it was saved anew, and is another beginning


def test_never_begins_anew_once(house):
    shutil.copytree(house / "old", house / "never")
    job, began = start(house, "never", "never")
    assert (began, job.step) == (0, 1)
    assert job.notes == [
        "the run begins anew, with checkpoint.resume=never",
        "step_00000004 is not this run's: its run began anew",
    ]
    assert [start(house, "never", "never")[1] for _ in range(3)] == [1, 2, 3]
    job, began = start(house, "never", "never")
    assert (began, job.notes[1]) == (0, "step_00000004 is not this run's: its run has finished")
    job, began = start(house, "never", "never", lr=2e-2)
    assert (began, job.notes[1]) == (0, "step_00000001 is not this run's: its run had optim.lr=0.01")
    assert start(house, "never", "auto", lr=2e-2)[1] == 1


def test_weights_alone_are_a_beginning(house):
    path = saved(house, "old", 3)
    assert [start(house, "weights", path, weights_only=True)[1] for _ in range(3)] == [0, 1, 2]
    assert start(house, "weights", saved(house, "old", 2), weights_only=True)[1] == 0
    assert start(house, "weights", path)[1] == 3  # all of it, not its weights alone


def test_weights_of_its_own_directory_are_a_beginning_though_the_run_saves_in_their_place(house):
    shutil.copytree(house / "old", house / "again")
    path = saved(house, "again", 1)
    assert [start(house, "again", path, weights_only=True)[1] for _ in range(4)] == [0, 1, 2, 3]


def test_all_ranks_go_on_where_the_run_has_stopped(house, tmp_path):
    config = jobs.write_config(tmp_path / "config.yaml", jobs.tiny(house / "data", tmp_path / "run", train={"steps": 5}))
    line = ["train", str(config), "train.exit_after_minutes=1e-4", "train.micro_batch_size=2", "checkpoint.resume=never"]
    # Four updates, of which a stop leaves two: a warm-up of a run that begins so.
    larger = [*line[:-1], "train.steps=1000", "train.tokens=4096", "train.global_batch_size=64"]
    answers = jobs.commands(tmp_path / "job", [line] * 3 + [larger], size=2)
    assert [[a.code for a in both] for both in answers] == [[75, 75], [75, 75], [0, 0], [75, 75]], answers
    assert jobs.row_count(tmp_path / "run") == 7


# --- what is a run's own, without runs ---------------------------------------------------------------------------------------


def manifest_of(config, **progress):
    return Manifest(3, 0.0, progress, MeshShape(), (), {}, dump(config))


def own(config, launch=None):
    launch = launch or Launch()
    return OwnCheckpoints(config, launch, beginning_of(config, launch))


def config_of(resume, **checkpoint):
    tree = {"model": {"vocab_size": 101}, "data": {"train": "store"}, "checkpoint": {"resume": str(resume), **checkpoint}}
    return from_dict(tree)


def test_a_job_that_its_launcher_starts_again_does_not_begin_anew_after_its_end():
    config = config_of("never")
    first, again = (Launch(launcher="torchrun", job="27", restart_count=count) for count in (0, 1))
    done = manifest_of(config, began=beginning_of(config, first), finished=True)
    assert not own(config, first)(Path("step_3"), done)
    assert own(config, again)(Path("step_3"), done)
    for other in (replace(again, job="28"), replace(again, launcher="srun")):
        assert not own(config, other)(Path("step_3"), done)
    nameless = Launch(launcher="torchrun", job="none", restart_count=1)
    assert not own(config, nameless)(
        Path("step_3"), replace(done, progress={"began": beginning_of(config, nameless), "finished": True})
    )


def test_a_directory_of_weights_is_known_by_its_name(tmp_path):
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text("{}")
    config = config_of(source)
    began = beginning_of(config, Launch())
    assert began == {"from": "weights", "path": str(source), "digest": ""}
    saved = manifest_of(config, began=began)
    assert own(config)(Path("step_3"), saved)
    (source / "config.json").unlink()
    source.rmdir()  # it is not needed any more
    assert own(config)(Path("step_3"), saved)
    assert not own(config_of(tmp_path / "other"))(Path("step_3"), saved)


@pytest.mark.parametrize(
    ("resume", "weights_only", "expected"),
    [("auto", False, True), ("never", False, False), ("x", False, False), ("x", True, True)],
)
def test_checkpoints_of_earlier_releases(resume, weights_only, expected):
    """They do not say where their run began: as those releases did, a run goes on from them or not."""
    config = config_of(resume, **({"weights_only": True} if weights_only else {}))
    mine = own(config)
    assert mine(Path("step_3"), manifest_of(config)) is expected
    said = "step_3 is not this run's: it was saved by an earlier release, which did not say where its run began"
    assert mine.others == ([] if expected else [said])


def test_a_manifest_that_cannot_be_read_is_nobodys():
    assert own(config_of("auto"))(Path("step_3"), None)
    mine = own(config_of("never"))
    assert not mine(Path("step_3"), None)
    assert mine.others == ["step_3 is not this run's: its manifest cannot be read"]


def test_a_damaged_checkpoint_of_its_own_is_passed_over(house):
    path = saved(house, "old", 1)
    for _ in range(2):
        start(house, "hurt", path)
    file = next(saved(house, "hurt", 3).glob("weights*"))
    file.write_bytes(file.read_bytes()[:-1])
    job, began = start(house, "hurt", path)
    assert began == 2 and len(job.damaged) == 1
    for step in (2, 3):
        next(saved(house, "hurt", step).glob("weights*")).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"or begin anew in another checkpoint\.dir"):
        start(house, "hurt", path)


def test_what_a_checkpoint_keeps_of_its_run(house):
    manifest = read_manifest(saved(house, "old", 2))
    assert manifest.progress["began"] == {"from": "auto", "job": "none "}
    assert manifest.progress["finished"] is False and read_manifest(saved(house, "old", STEPS)).progress["finished"] is True
    assert manifest.progress["gauge"] == {"first": 128, "full": 128, "warmup_steps": 2, "warmup": 256}
    assert values_then(manifest)["optim.lr"] == 1e-2
    assert (saved(house, "old", 2) / MANIFEST).is_file()
