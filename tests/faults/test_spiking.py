"""A poisoned document, and steps that are skipped for ever: survived by a run alone, or ended for good, under every layout alike."""

import json
import shutil
import sys

import jobs
import poisoned
import pytest
from breaking import LAYOUTS, MAIN, ROOT, codes, kinds, said
from jobs import environment

from megatrain.checkpoint.manifest import read_manifest

STEPS, SPIKE = 24, 18


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The folder of a text with a poisoned document."""
    folder = tmp_path_factory.mktemp("poisoned")
    poisoned.write_store(folder / "data", poisoned.DOCUMENT)
    return folder


def train(text, run, layout, **train):
    """Train on the poisoned text; how each rank ended."""
    tree = jobs.tiny(
        text / "data",
        run,
        train={"steps": STEPS, "on_spike": "rollback", "spike_warmup_steps": 4, **train},
        checkpoint={"save_every": 5, "keep": 0},
    )
    for key in LAYOUTS[layout].keys:
        section, name = key.split("=")[0].split(".")
        tree[section][name] = int(key.split("=")[1])
    run.mkdir(parents=True, exist_ok=True)
    config, size, port = jobs.write_config(run / "given.yaml", tree), LAYOUTS[layout].size, jobs.free_port()
    with jobs.Job(run / "job") as job:
        for rank in range(size):
            job.fork([poisoned.__file__, str(config)], environment(rank, size, port))
        return job.finish(2 * jobs.SECONDS)


@pytest.fixture(scope="module")
def alone(text):
    """The run of one rank."""
    ended = train(text, text / "alone", "1 rank")
    assert codes(ended) == [0], said(ended)
    return text / "alone"


@pytest.mark.fault(
    injection="a document of one token repeated, whose loss counts 200 times, at step 18",
    promise="back to step 15, its samples left out and named (document, file, offset), the same under every layout",
    layout="{layout}",
)
@pytest.mark.parametrize("layout", [MAIN, "dp 2"])
def test_a_poisoned_document_is_survived(text, alone, measured, layout):
    run = text / layout.replace(" ", "_")
    ended = train(text, run, layout)
    assert codes(ended) == [0] * len(ended), said(ended)
    (back,), (left_out,) = kinds(run, "rollback"), kinds(run, "skip_data")
    assert (back["step"], back["to"]) == (SPIKE, 15) and left_out["samples"] == [120, 144]
    assert left_out["documents"][0] == {"file": f"{text}/data.bin", "document": 30, "offset": 1200, "tokens": 9}
    assert left_out["documents"] == kinds(alone, "skip_data")[0]["documents"]
    ours, theirs = jobs.rows(run), jobs.rows(alone)
    assert sorted(ours) == sorted(theirs) == list(range(1, STEPS + 1))
    for step in ours:
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-4), step
    measured.recovered(lost=SPIKE + 1 - 15)


@pytest.mark.fault(
    injection="a run that has left out samples goes on under another layout",
    promise="the samples stay left out",
    layout=MAIN,
)
def test_another_layout_goes_on_without_the_samples(text, alone, measured):
    run = text / "moved"
    shutil.copytree(alone, run)
    shutil.rmtree(run / f"checkpoints/step_{STEPS:08d}")
    ended = train(text, run, MAIN)
    assert codes(ended) == [0] * 4, said(ended)
    ours, theirs = jobs.rows(run), jobs.rows(alone)
    assert [ours[step]["loss"] for step in range(21, 25)] == pytest.approx(
        [theirs[step]["loss"] for step in range(21, 25)], rel=1e-4
    )
    assert read_manifest(run / f"checkpoints/step_{STEPS:08d}").progress["left_out"] == [[120 * 16, 144 * 16]]
    measured.recovered(lost=0)


@pytest.mark.fault(
    injection="weights become NaN, and every step is skipped, under a launcher that may start the ranks again three times",
    promise="all end with exit code 76 after train.max_skipped_in_row steps, and nothing starts them again",
    layout="tp 2",
)
def test_steps_that_are_skipped_for_ever_end_the_job(house, measured):
    run = house.run("skipped")
    words = [*house.words("dp 2", "skipped"), "parallel.tensor_parallel_size=2", "optim.lr=1e15", "optim.clip_grad=0.0"]
    env = {**environment(), "PYTHON": sys.executable, "MAX_RESTARTS": "3"}
    with jobs.Job(house.folder / "skipped_job") as job:
        job.start(["bash", str(ROOT / "launch/local.sh"), "2", *words], env)
        (ended,) = job.finish(2 * jobs.SECONDS)
    assert ended.code == 76, ended
    assert ended.err.count("10 steps in a row were skipped") == 1, ended.err
    assert len(kinds(run, "start", "resume")) == len(kinds(run, "diverged")) == 1
    assert json.loads((run / "diverged").read_text())["step"] < 20 and not (run / "preempted").exists()
    measured.recovered(lost=0)
