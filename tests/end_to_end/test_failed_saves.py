"""A run whose checkpoints cannot be written for a while goes on, and saves as soon as they can."""

import jobs
import pytest

import megatrain
from megatrain.checkpoint import retries
from megatrain.checkpoint.together import CheckpointError


def run_with(tmp_path, away, **checkpoint):
    """Train 12 steps, saved every third; the checkpoints' directory is away (a file stands there) from before step away[0] to away[1]."""
    jobs.write_store(tmp_path / "data")
    tree = jobs.tiny(tmp_path / "data", tmp_path / "run", train={"steps": 12}, checkpoint={"save_every": 3, **checkpoint})
    job = megatrain.build(tree)
    folder, aside = tmp_path / "run/checkpoints", tmp_path / "run/aside"

    def disturb(run):
        if run.step + 1 == away[0]:
            folder.rename(aside)
            folder.write_text("")
        if run.step + 1 == away[1]:
            folder.unlink()
            aside.rename(folder)

    job.observers.before_update.append(disturb)
    try:
        megatrain.train(job)
    finally:
        job.close()


def told(run):
    return [(event["event"], event["step"]) for event in jobs.events(run) if event["event"].startswith(("save", "end"))]


def test_saves_fail_for_a_while_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 0.0)
    run_with(tmp_path, (5, 8), asynchronous=False)
    assert told(tmp_path / "run") == [
        *[("save", 3), ("save_failed", 6), ("save_failed", 7)],
        *[("save", 8), ("save", 9), ("save", 12), ("end", 12)],
    ]
    failed = next(event for event in jobs.events(tmp_path / "run") if event["event"] == "save_failed")
    assert failed["message"].startswith(f"checkpoint.dir={tmp_path}/run/checkpoints cannot be written (File exists). Set")


def test_the_last_save_waits_for_its_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "LAST_WAIT_SECONDS", 0.01)
    with pytest.raises(CheckpointError, match=r"could not be saved 2 times in a row \(checkpoint.give_up_after=2\)"):
        run_with(tmp_path, (11, 99), asynchronous=False, give_up_after=2)  # step 9 is saved before its directory goes
    assert told(tmp_path / "run")[-2:] == [("save_failed", 12), ("save_failed", 12)]
    assert (tmp_path / "run/aside/step_00000009/manifest.json").is_file()
