"""`megatrain eval --tasks`: files, comparisons and errors, alone and as two replicas, from a checkpoint that a run has saved."""

import json

import jobs
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import megatrain
from megatrain.data.prepare.tokenize import tokenize_files
from megatrain.evaluation.tasks import SHIPPED

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A run of a byte model on the texts of a shipped task."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = (SHIPPED / "text_en.jsonl").read_text().splitlines()
    (folder / "data.txt").write_text("\n".join(json.loads(line)["text"] for line in lines[:10]))
    tokenize_files([folder / "data.txt"], "bytes", folder / "data", append_eod=True)
    model, train = {"vocab_size": None, "seq_length": 256}, {"steps": 3}
    data = {"train": str(folder / "data"), "tokenizer": "bytes"}
    run = megatrain.build(jobs.tiny(data, folder / "run", model=model, train=train))
    assert megatrain.train(run)
    run.loader.close()
    return folder


def asked(house, *words):
    return jobs.here(str(house / "run/checkpoints"), *words, verb="eval")


def test_a_table_files_and_contamination(house, tmp_path):
    names = ["text_en", "quiz_zh", "cloze_en"]
    files = [
        "--json",
        str(tmp_path / "r.json"),
        "--png",
        str(tmp_path / "r.png"),
        "--items",
        str(tmp_path / "r.jsonl"),
        "--tensorboard",
        str(tmp_path / "board"),
    ]
    ended = asked(house, "--tasks", *names, "--limit", "12", "--num-fewshot", "0", "--contamination", *files)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines()[1].split()[:2] == ["text_en", "bits_per_byte"]
    assert "text_en: the training data has 13 words in a row of 10 of 12 items (83.3%); 0 are too short to tell; " in ended.out
    assert "quiz_zh: the training data has 13 words in a row of 0 of 12 items (0.0%)" in ended.out
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["model"]["source"] == str(house / "run/checkpoints/step_00000003")
    assert (found["model"]["step"], found["model"]["max_length"], found["model"]["layout"]) == (
        3,
        256,
        {"tp": 1, "pp": 1, "dp": 1},
    )
    assert (found["asked"]["seed"], found["asked"]["limit"], found["asked"]["num_fewshot"]) == (1234, 12, 0)
    assert len(found["model"]["identity"]) == 32 and found["versions"]["megatrain"] == megatrain.__version__
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 36
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    (point,) = board.Scalars("eval/text_en/bits_per_byte")
    assert (point.step, point.value) == (3, pytest.approx(found["tasks"]["text_en"]["metrics"]["bits_per_byte"]["value"]))


def test_two_replicas_give_the_same_and_the_same_errors(house, tmp_path):
    here, words = str(house / "run/checkpoints"), ["--tasks", "quiz_zh", "topic_en", "--limit", "3"]
    alone = asked(house, *words, "--json", str(tmp_path / "one.json"), "--batch", "2")
    both = ["eval", here, *words, "--json", str(tmp_path / "two.json"), "parallel.pipeline_parallel_size=1"]
    long = ["eval", here, "--tasks", "qa_en", "--long", "refuse"]
    others = [["eval", here, "--tasks", "quiz_zh", "--limit", limit] for limit in ("3", "4")]
    right, refused, apart = jobs.commands(tmp_path / "job", [both, long, others], size=2)
    assert [ended.code for ended in (alone, *right)] == [0, 0, 0], right
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["model"]["layout"] == {"tp": 1, "pp": 1, "dp": 2}
    for name in ("quiz_zh", "topic_en"):
        assert one["tasks"][name]["per_item"] == two["tasks"][name]["per_item"]
        assert one["tasks"][name]["hash"] == two["tasks"][name]["hash"]
    for rank in refused:
        assert rank.code == 1 and "qa_en.jsonl:1: the item is longer than the model, which has 256 positions." in rank.err
    for rank in apart:
        assert rank.code == 1 and "The task quiz_zh differs between ranks" in rank.err


def test_comparisons(house, tmp_path):
    for name, shots in (("a", "0"), ("b", "2")):
        ended = asked(
            house,
            "--tasks",
            "quiz_en,cloze_en",
            "--limit",
            "6",
            "--num-fewshot",
            shots,
            "--json",
            str(tmp_path / f"{name}.json"),
        )
        assert ended.code == 0, ended.err
    pair = ["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    ended = jobs.here(*pair, "--png", str(tmp_path / "both.png"), verb="eval")
    assert (ended.code, ended.err) == (0, "")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    lines = ended.out.splitlines()
    assert lines[2].split()[:4] == ["task", "metric", "first", "second"]
    assert [line.split()[:2] for line in lines[3:4]] == [["quiz_en", "acc"]]
    assert [line.split(":")[0] for line in lines[-5:-3]] == ["quiz_en acc", "cloze_en acc"]
    assert lines[-2:] == [
        "quiz_en: not asked alike, with 0 and 2 examples",
        "cloze_en: not asked alike, with 0 and 2 examples",
    ]
    here = str(house / "run/checkpoints")
    same = jobs.here("--compare", here, here, "--tasks", "quiz_en", "--limit", "3", verb="eval")
    assert same.code == 0 and "0 of 5 differences are more than chance would explain" in same.out


def test_a_chat(house):
    ended = asked(house, "--tasks", "quiz_en", "--limit", "2", "--chat")
    assert ended.code == 1 and "there is no chat template beside bytes" in ended.err
    ended = asked(house, "--tasks", "quiz_en", "--limit", "2", "--num-fewshot", "1", "--chat", "--chat-template", "alpaca")
    assert (ended.code, ended.err) == (0, "")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--tasks", "quiz"], 1, "--tasks quiz: no task has this name. Did you mean quiz_zh?"),
        (["--tasks", "infill_en"], 1, "infill_en.yaml: infilling needs a model that fills blanks, a GLM"),
        (
            ["--tasks", "qa_en", "--long", "refuse"],
            1,
            "qa_en.jsonl:1: the item is longer than the model, which has 256 positions.",
        ),
        (["--tasks", "qa_en", "--num-fewshot", "99"], 1, "99 examples are asked for, and there are 23 other items to show."),
        (["--tasks", "quiz_en", "--against", "/nowhere"], 1, "/nowhere"),
        (
            ["--tasks", "quiz_en", "--json", "/nowhere/r.json"],
            1,
            "--json /nowhere/r.json: there is no folder /nowhere. Make it first.",
        ),
        (["--tasks", "quiz_en", "--items", "/"], 1, "--items / is a folder. Give a file in it."),
        (
            ["--tasks", "quiz_en", "--png", "/nowhere/r.png"],
            1,
            "--png /nowhere/r.png: there is no folder /nowhere. Make it first.",
        ),
        (["--tasks", "quiz_en", "optim.lr=1"], 1, "only the layout can be chosen here"),
        (["--tasks", "quiz_en", "--json"], 2, "--json: with --tasks say where results go: --json FILE."),
        (["--limit", "3"], 2, "--limit is about tasks. Name some: --tasks NAME."),
        (["--json", "r.json"], 2, "--json r.json: a file of results is written with --tasks."),
        (["--png", "r.png"], 2, "--png draws the scores of tasks. Name some: --tasks NAME."),
        (["--compare", "a", "b"], 2, "--compare names both models, so "),
    ],
)
def test_what_cannot_be_asked(house, words, code, message):
    ended = asked(house, *words)
    assert ended.code == code and message in ended.err


def test_without_tasks_all_is_as_it_was(house):
    here, valid = str(house / "run/checkpoints"), f"data.valid={house / 'data'}"
    rows = [
        jobs.here(*words, verb="eval") for words in ([here, "--json", valid], ["--json", here, valid], [here, valid, "--json"])
    ]
    assert [ended.code for ended in rows] == [0, 0, 0]
    assert len({ended.out for ended in rows}) == 1 and json.loads(rows[0].out)["set"] == "valid"
    assert "the following arguments are required: CKPT" in jobs.here("--tasks", "quiz_en", here, verb="eval").err
