"""Two runs do not share a log.dir, and a run whose log.dir is removed goes on in a new one."""

import shutil
from pathlib import Path

import jobs
import pytest

import megatrain
from megatrain.checkpoint.claim import claim_log
from megatrain.config.load import from_dict
from megatrain.parallel.mesh import ParallelContext
from megatrain.program import described
from megatrain.records.log import RunLog
from megatrain.runtime.launch import Launch
from megatrain.transport.group import TransportError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return jobs.write_store(tmp_path_factory.mktemp("two_runs") / "data")


def contents(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_a_run_in_the_log_dir_of_a_live_one_is_refused_on_every_rank_and_touches_nothing(tmp_path, data):
    run = tmp_path / "run"
    held = claim_log(run, ParallelContext.single())
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "preempted").write_text("{}")
    before = contents(run)
    tree = jobs.tiny(
        data, run, parallel={"device": "cpu", "tensor_parallel_size": 2}, checkpoint={"dir": str(tmp_path / "other")}
    )
    ended = jobs.train(tmp_path / "job", str(jobs.write_config(tmp_path / "config.yaml", tree)), size=2)
    assert [end.code for end in ended] == [1, 1]
    assert all(f"another run keeps its log in log.dir={run}: process" in end.err for end in ended), ended
    assert contents(run) == before and not (tmp_path / "other").exists()
    held.release()


def test_a_run_is_told_from_others_on_its_port_by_its_log_dir(tmp_path, data, monkeypatch):
    """On one machine by the whole path, where ranks may be started in several directories."""
    said = []

    def join(*_args, job, **_more):
        said.append(job)
        raise TransportError("no")

    monkeypatch.setattr("megatrain.program.connect", join)
    monkeypatch.chdir(tmp_path)
    tree = jobs.tiny(data, Path("run"))
    with pytest.raises(TransportError):
        megatrain.build(tree)
    assert said == [f"the run in log.dir={tmp_path}/run"]
    assert described(from_dict(tree), Launch(world_size=4, local_world_size=2)) == "the run in log.dir=run"


@pytest.mark.fault(
    injection="a rank of another run of the user comes to the port where a run waits for its own",
    promise="it is told that another job uses the port; the run trains when its own rank comes",
    layout="dp 2",
)
def test_a_rank_of_another_run_on_the_same_port_is_turned_away(tmp_path, data, measured):
    configs = [
        jobs.write_config(tmp_path / f"{name}.yaml", jobs.tiny(data, tmp_path / name, train={"steps": 3}))
        for name in ("a", "b")
    ]
    port = jobs.free_port()
    with jobs.Job(tmp_path / "own") as own, jobs.Job(tmp_path / "stranger") as stranger:
        own.fork(["train", str(configs[0])], jobs.environment(0, 2, port))
        stranger.fork(["train", str(configs[1])], jobs.environment(1, 2, port))
        (turned,) = stranger.finish()
        own.fork(["train", str(configs[0])], jobs.environment(1, 2, port))
        ended = own.finish()
    assert [end.code for end in (turned, *ended)] == [1, 0, 0], (turned, ended)
    assert turned.err.startswith(
        f"megatrain: error: rank 1: another job uses this port (MASTER_PORT={port}): the run in log.dir={tmp_path}/a, of 2 ranks; this "
        f"one is the run in log.dir={tmp_path}/b, of 2 ranks. Choose another MASTER_PORT, for example "
    )


def test_a_log_dir_that_is_removed_is_made_again_and_told_once(tmp_path, data, capsys):
    run = tmp_path / "run"
    job = megatrain.build(
        jobs.tiny(data, run, train={"steps": 8}, log={"dir": str(run), "to": ["tensorboard"], "peak_tflops": 1.0})
    )

    def disturb(job):
        if job.step in (3, 5):
            shutil.rmtree(run)

    job.observers.before_update.append(disturb)
    assert megatrain.train(job)
    job.close()
    assert capsys.readouterr().err == (
        f"warning: {run}/metrics.jsonl was removed while the run goes on; from here on it is written anew; training goes on\n"
    )
    assert sorted(jobs.rows(run)) == [5, 6, 7, 8]  # a row is written once the next step is queued
    assert [event["event"] for event in jobs.events(run)] == ["save", "end"]
    assert (run / "checkpoints/step_00000008/manifest.json").is_file() and len(list((run / "tensorboard").iterdir())) == 1


def test_a_log_dir_that_another_run_has_taken_is_left_to_it(tmp_path, capsys):
    asked = []
    with RunLog(tmp_path, total_steps=2, sequence_length=1, lost=lambda: asked.append(1) or "another run has it") as log:
        log.event("start")
        (tmp_path / "events.jsonl").unlink()
        (tmp_path / "metrics.jsonl").unlink()
        log.event("save", 1)
        log.event("end", 2)
    assert not (tmp_path / "events.jsonl").exists() and asked == [1]
    assert capsys.readouterr().err == "warning: another run has it; training goes on\n"
