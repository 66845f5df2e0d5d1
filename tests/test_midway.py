"""What a run asks its own model between steps: the run is the same to the bit, every layout writes the same, and nothing stops it."""

import json
import os
import shutil
import signal

import jobs
import pytest

import megatrain
from megatrain.config.load import from_dict
from megatrain.config.source import ConfigError
from megatrain.config.validate import validate
from megatrain.inference.continuations import Continuations

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = {"prompts": ["the cat", "[MASK]\n## step 1"], "every": 1, "max_tokens": 6}


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder with training data, and what one process leaves behind: run `plain`, and `asking` with samples after every step."""
    folder = tmp_path_factory.mktemp("midway")
    jobs.write_store(folder / "data")
    for name, log in (("plain", {}), ("asking", {"samples": SAMPLES})):
        train(tree(folder, folder / name, log=log))
    return folder


def tree(house, run, **sections):
    """A config of four steps in float64, where layouts do not differ by rounding, with a checkpoint every two."""
    given = {
        "model": {"vocab_size": 257, "num_layers": 4},
        "train": {"steps": 4, "precision": "fp64"},
        "checkpoint": {"save_every": 2},
    }
    merged = {name: {**given.get(name, {}), **sections.get(name, {})} for name in {**given, **sections}}
    return jobs.tiny({"train": str(house / "data"), "tokenizer": "bytes"}, run, **merged)


def train(config):
    """Train in this process; whether all steps were done."""
    job = megatrain.build(config)
    try:
        return megatrain.train(job)
    finally:
        job.close()


def page(run):
    return (run / "samples.md").read_text()


def test_a_run_with_samples_is_the_same_to_the_bit(house):
    jobs.same(house / "asking", house / "plain", 4)
    headings = [line for line in page(house / "asking").splitlines() if line.startswith("#")]
    assert headings == ["# Samples", "## step 1", "## step 2", "## step 3", "## step 4"]
    assert not (house / "plain/samples.md").exists()


LAYOUTS = {
    "tp2-sp": ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"],
    "interleaved": ["parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_size=2", "parallel.schedule=interleaved"],
    "dp2-zero3": ["parallel.zero_stage=3"],
}


@pytest.fixture(scope="module")
def layouts(house):
    """The layouts with and without samples, one after the other in one pair of processes."""
    file = jobs.write_config(house / "config.yaml", tree(house, house / "run"))
    ask = [f"log.samples.{key}={json.dumps(value)}" for key, value in SAMPLES.items()]
    lines = [
        ["train", str(file), *layout, f"log.dir={house}/{name}-{kind}", *more]
        for name, layout in LAYOUTS.items()
        for kind, more in (("plain", []), ("asking", ask))
    ]
    for answers in jobs.commands(house / "layouts", lines, size=2):
        assert [(answer.code, answer.err) for answer in answers] == [(0, "")] * 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_layout_of_a_run_notices_samples_and_all_write_the_same(house, layouts, name):
    jobs.same(house / f"{name}-asking", house / f"{name}-plain", 4)
    assert page(house / f"{name}-asking") == page(house / "asking")


def test_after_a_resume_each_step_is_on_the_page_once(house, tmp_path):
    run = tmp_path / "asking"
    shutil.copytree(house / "asking", run)
    shutil.rmtree(run / "checkpoints/step_00000004")
    (run / "checkpoints/latest").write_text("step_00000002\n")
    assert train(tree(house, run, log={"samples": SAMPLES}))
    jobs.same(run, house / "asking", 4)
    assert page(run) == page(house / "asking")


def test_a_run_that_is_told_to_stop_while_it_writes_ends_with_a_checkpoint(house, tmp_path, monkeypatch, capsys):
    written = Continuations.written

    def told(self, engine, prompts):
        os.kill(os.getpid(), signal.SIGTERM)
        return written(self, engine, prompts)

    monkeypatch.setattr(Continuations, "written", told)
    run = tmp_path / "run"
    config = tree(house, run, log={"samples": {**SAMPLES, "every": 3, "max_tokens": 10_000}}, checkpoint={"save_every": 0})
    assert not train(config)
    assert "the samples after step 3 were left: the run was told to stop" in capsys.readouterr().out
    assert not (run / "samples.md").exists() and (run / "checkpoints/step_00000003").is_dir()


def test_a_run_goes_on_where_its_model_has_no_answer(house, tmp_path, monkeypatch):
    monkeypatch.setattr(Continuations, "written", lambda *_: (_ for _ in ()).throw(ValueError("the logits are not finite.")))
    assert train(tree(house, tmp_path / "run", log={"samples": {**SAMPLES, "every": 4}}))
    (bad,) = (event for event in jobs.events(tmp_path / "run") if event["event"] == "bad_evaluation")
    assert (bad["step"], bad["message"]) == (4, "the samples after step 4 came to nothing: the logits are not finite.")
    jobs.same(tmp_path / "run", house / "plain", 4)


def test_a_glm_fills_the_blanks_of_its_prompts(house, tmp_path):
    samples = {"prompts": ["a[MASK]b[MASK]", "no blank"], "every": 0, "max_tokens": 3}
    config = tree(house, tmp_path / "run", log={"samples": samples}, model={"seq_length": 32, "vocab_size": None})
    config["data"]["objective"] = "glm"
    assert train(config)
    text = page(tmp_path / "run")
    assert text.count("\nBlank 1: ") == 2 and text.count("\nBlank 2: ") == 1 and "Continuation" not in text


def test_what_is_wrong_with_a_prompt_is_told_before_the_first_step(house, tmp_path):
    config = tree(house, tmp_path / "run", log={"samples": {"prompts": ["short", "seventeen letters"]}})
    with pytest.raises(ValueError, match=r"log\.samples\.prompts\[1\]: it has 17 tokens, and model\.max_positions is 16\."):
        train(config)
    assert not (tmp_path / "run/metrics.jsonl").read_text()
    config["data"]["tokenizer"] = None
    with pytest.raises(ConfigError, match=r"log\.samples\.prompts is text, and data\.tokenizer is null\."):
        validate(from_dict(config), 1)
