"""What a run asks its own model between steps: the run is the same to the bit, every layout writes the same, and nothing stops it."""

import json
import os
import shutil
import signal
import sys
import time

import jobs
import pytest

import megatrain
from megatrain.config.load import from_dict
from megatrain.config.source import ConfigError
from megatrain.config.validate import validate
from megatrain.evaluation.compared import differences_of_manner, read_results
from megatrain.evaluation.items import TaskError
from megatrain.inference.continuations import Continuations
from megatrain.inference.running import RunningEngine
from megatrain.records.rows import read_tasks

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = {"prompts": ["the cat", "[MASK]\n## step 1"], "every": 1, "max_tokens": 6}
TASKS = {"tasks": ["quiz_en", "qa_en"], "every": 3, "limit": 2}


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder with training data, and what one process leaves behind: run `plain`, and `asking` with samples and tasks."""
    folder = tmp_path_factory.mktemp("midway")
    jobs.write_store(folder / "data")
    train(tree(folder, folder / "plain"))
    train(tree(folder, folder / "asking", log={"samples": SAMPLES}, eval=TASKS))
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


def tasks(run):
    """The rows of tasks, without how long they took, and the items of the files of results."""
    rows = read_tasks(run / "metrics.jsonl")
    files = [read_results(file)["tasks"] for file in sorted((run / "tasks").iterdir())]
    items = [{name: (of["metrics"], of["items"], of["first"]) for name, of in file.items()} for file in files]
    return [{key: value for key, value in row.items() if key != "task_seconds"} for row in rows], items


def test_a_run_that_asks_its_model_is_the_same_to_the_bit(house):
    jobs.same(house / "asking", house / "plain", 4)
    assert not (house / "plain/tasks").exists()
    headings = [line for line in page(house / "asking").splitlines() if line.startswith("#")]
    assert headings == ["# Samples", "## step 1", "## step 2", "## step 3", "## step 4"]
    assert not (house / "plain/samples.md").exists()


def test_a_run_finds_of_tasks_what_the_verb_finds_of_its_checkpoint(house, tmp_path):
    words = ["--tasks", *TASKS["tasks"], "--limit", "2", "--dtype", "float64", "--json", str(tmp_path / "results.json")]
    assert jobs.here(str(house / "asking/checkpoints"), *words, verb="eval").code == 0
    ours, theirs = (read_results(file) for file in (house / "asking/tasks/step_00000004.json", tmp_path / "results.json"))
    for of in (*ours["tasks"].values(), *theirs["tasks"].values()):
        del of["seconds"]
    assert ours["tasks"] == theirs["tasks"]
    assert {**ours["model"], "source": "", "identity": ""} == {**theirs["model"], "source": "", "identity": ""}
    assert list(differences_of_manner(ours, theirs)) == []


LAYOUTS = {
    "interleaved": ["parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_size=2", "parallel.schedule=interleaved"],
    "dp2-zero3": ["parallel.zero_stage=3"],
}


@pytest.fixture(scope="module")
def layouts(house):
    """The layouts with and without samples, one after the other in one pair of processes."""
    file = jobs.write_config(house / "config.yaml", tree(house, house / "run"))
    asked = {"log.samples": SAMPLES, "eval": TASKS}
    ask = [f"{group}.{key}={json.dumps(value)}" for group, of in asked.items() for key, value in of.items()]
    lines = [
        ["train", str(file), *layout, f"log.dir={house}/{name}-{kind}", *more]
        for name, layout in LAYOUTS.items()
        for kind, more in (("plain", []), ("asking", ask))
    ]
    for answers in jobs.commands(house / "layouts", lines, size=2):
        assert [(answer.code, answer.err) for answer in answers] == [(0, "")] * 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_layout_of_a_run_notices_that_it_is_asked_and_all_answer_the_same(house, layouts, name):
    run = house / f"{name}-asking"
    jobs.same(run, house / f"{name}-plain", 4)
    assert page(run) == page(house / "asking")
    rows, items = tasks(run)
    assert len(rows) == len(items) == 2 and list(rows[0]["tasks"]) == ["quiz_en", "qa_en"]
    assert (rows, items) == tasks(house / "asking")


def test_after_a_resume_each_step_is_on_the_page_once(house, tmp_path):
    run = tmp_path / "asking"
    shutil.copytree(house / "asking", run)
    shutil.rmtree(run / "checkpoints/step_00000004")
    (run / "checkpoints/latest").write_text("step_00000002\n")
    assert train(tree(house, run, log={"samples": SAMPLES}, eval=TASKS))
    jobs.same(run, house / "asking", 4)
    assert (page(run), tasks(run)) == (page(house / "asking"), tasks(house / "asking"))
    assert [event["step"] for event in jobs.events(run) if event["event"] == "tasks"] == [3, 4, 3, 4]


@pytest.mark.parametrize(
    ("what", "asked"), [("samples", {"log": {"samples": SAMPLES}}), ("tasks", {"eval": {**TASKS, "every": 1}})]
)
def test_a_run_that_is_told_to_stop_while_its_model_works_ends_with_a_checkpoint(
    house, tmp_path, monkeypatch, capsys, what, asked
):
    steps = []

    def told(self):
        steps.append(len(steps))
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 10
            while not self._told() and time.monotonic() < deadline:
                time.sleep(0.001)
        return step(self)

    step = RunningEngine.step
    monkeypatch.setattr(RunningEngine, "step", told)
    run = tmp_path / "run"
    assert not train(tree(house, run, **asked, checkpoint={"save_every": 0}))
    assert f"the {what} after step 1 were left: the run was told to stop" in capsys.readouterr().out
    assert len(steps) == 2 and (run / "checkpoints/step_00000001").is_dir()
    assert not (run / "samples.md").exists() and not (run / "tasks").exists()


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


def test_what_is_wrong_with_a_prompt_or_a_task_is_told_before_the_first_step(house, tmp_path, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "sacrebleu", None
    )  # as if it were not installed: megatrain.evaluation.run_tasks asks for it
    config = tree(house, tmp_path / "run", log={"samples": {"prompts": ["short", "seventeen letters"]}})
    with pytest.raises(ValueError, match=r"log\.samples\.prompts\[1\]: it has 17 tokens, and model\.max_positions is 16\."):
        train(config)
    assert not (tmp_path / "run/metrics.jsonl").read_text()
    config["log"]["samples"] = {}
    for name, error in (
        ("quis_en", r"eval\.tasks quis_en: no task has this name\. Did you mean quiz_en\?"),
        ("infill_en", "infilling needs a model that fills blanks"),
        ("translate_en_zh", r"BLEU or chrF needs sacrebleu: pip install 'megatrain\[eval\]'"),
    ):
        with pytest.raises((ConfigError, TaskError, ImportError), match=error):
            train({**config, "eval": {"tasks": [name]}})
    config["log"]["samples"] = {"prompts": ["a"]}
    config["data"]["tokenizer"] = None
    with pytest.raises(ConfigError, match=r"log\.samples\.prompts is text, and data\.tokenizer is null\."):
        validate(from_dict(config), 1)
