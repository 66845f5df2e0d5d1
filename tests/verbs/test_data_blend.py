"""`megatrain data blend`: what a run will read, printed before it is started."""

import jobs
import pytest


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blend")
    for name, documents in (("web", 100), ("wiki", 8)):
        jobs.write_store(folder / name, documents=documents)
    train = [{"path": f"{folder}/web", "name": "web"}, {"path": f"{folder}/wiki", "name": "wiki"}]
    tree = jobs.tiny({"train": train}, folder / "run", train={"steps": 50})
    return str(jobs.write_config(folder / "run.yaml", tree))


def test_a_blend_is_printed_and_nothing_is_written(config, tmp_path):
    ended = jobs.here("blend", config, "data.schedule=[{from_share: 0.8, weights: {web: 1, wiki: 0}}]", verb="data")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == [
        "a run of 50 steps, 400 samples",
        "corpus         samples              tokens    epochs  each document is seen",
        "web                240               3,840      0.96  0 or 1 times",
        "wiki               160               2,560      8.42  8 or 9 times",
        "total              400               6,400",
        "from step 1: web 50.0%, wiki 50.0%",
        "from step 41: web 100.0%",
        "warning: wiki is seen 8.4 times by the end; beyond 4 times repeated text teaches ever less (arXiv:2305.16264). Add text, give it "
        "a smaller weight or max_epochs, or train on fewer tokens",
    ]


def test_a_layout_needs_no_ranks_and_errors_are_of_the_data(config):
    ended = jobs.here("blend", config, "parallel.tensor_parallel_size=4", "train.steps=100000", verb="data")
    assert ended.code == 0 and "from step 1: web 50.0%, wiki 50.0%" in ended.out
    wrong = jobs.here("blend", config, "data.schedule=[{from_share: 0.8, weights: {web: 1}}]", verb="data")
    assert wrong.code == 1 and "data.schedule[0].weights does not name wiki" in wrong.err


def test_a_run_with_answers_and_blanks(config, tmp_path):
    """Samples of a GLM are of its text, and pairs are counted as pairs."""
    for name in ("prompts", "answers"):
        jobs.write_store(tmp_path / name, documents=30, length=6)
    pairs = f"{{path: {tmp_path}/prompts, answers: {tmp_path}/answers, name: pairs, max_epochs: 2}}"
    text = f"{{path: {config.removesuffix('run.yaml')}web, name: web}}"
    words = [
        "data.objective=glm",
        "model.family=glm",
        "model.seq_length=64",
        "model.vocab_size=140",
        "train.steps=4",
        "data.glm.objective_mix.sentence=0",
    ]
    ended = jobs.here("blend", config, *words, f"data.train=[{text}, {pairs}]", verb="data")
    assert ended.code == 0, ended.err
    assert [line.split()[:4] for line in ended.out.splitlines()[2:4]] == [
        ["web", "16", "784", "0.20"],
        ["pairs", "16", "576", "1.60"],
    ]
