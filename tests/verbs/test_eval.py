"""`megatrain eval`: loss, perplexity, bits per byte and accuracy of each set, under any layout, as the run itself found them."""

import json
import math

import jobs
import pytest

import megatrain
from megatrain.data.indexed import TokenStore
from megatrain.data.prepare.tokenize import tokenize_files

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A run of a byte model with two validation sets."""
    folder = tmp_path_factory.mktemp("eval")
    texts = {"data": "abc déf " * 400, "web": "abc déf\n" * 30, "code": "def f(): pass\n" * 20}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
        tokenize_files([folder / f"{name}.txt"], "bytes", folder / name, append_eod=True)
    sets = {"web": str(folder / "web"), "code": str(folder / "code")}
    data = {"train": str(folder / "data"), "valid": sets, "tokenizer": "bytes"}
    config = jobs.tiny(data, folder / "run", model={"vocab_size": None}, train={"eval_batches": 0})
    run = megatrain.build(config)
    assert megatrain.train(run)
    run.loader.close()
    return folder


def rows(ended):
    assert (ended.code, ended.err) == (0, "")
    return {row["set"]: row for row in map(json.loads, ended.out.splitlines())}


def test_the_numbers_of_the_run_itself(house):
    found = rows(jobs.here(str(house / "run/checkpoints"), "--json", verb="eval"))
    lines = [json.loads(line) for line in (house / "run/metrics.jsonl").read_text().splitlines()]
    (evaluated,) = [line for line in lines if "valid_loss" in line]
    for name, loss in evaluated["valid_losses"].items():
        row, store = found[name], TokenStore(house / name)
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["tokens"] == store.tokens - 1
        size = len((house / f"{name}.txt").read_bytes())
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2) * store.tokens / size, rel=1e-6)
        assert 0 <= row["token_accuracy"] <= 1


def test_another_layout_other_data_and_a_line_for_people(house, tmp_path):
    words = [str(house / "run/checkpoints/step_00000008"), f"data.valid={house / 'web'}", "parallel.tensor_parallel_size=2"]
    pair = jobs.train(tmp_path / "job", *words, size=2, verb="eval")
    assert [ended.code for ended in pair] == [0, 0]
    said = max((ended.out for ended in pair), key=len)
    assert said.startswith("valid: loss ") and "bits per byte" in said and said.count("\n") == 1
    alone = jobs.here(words[0], words[1], "--json", verb="eval")
    assert f"loss {rows(alone)['valid']['loss']:.4f} nats" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lr=1"], "only data.*, parallel.*, train.micro_batch_size and train.eval_batches can be chosen here"),
        (["data.valid=[]"], "data.valid is empty, so there is nothing to evaluate on"),
        (["data.valid=/nowhere"], "/nowhere"),
        (["data.tokenizer=/nowhere.json"], "the tokenizer /nowhere.json cannot be read"),
    ],
)
def test_what_cannot_be_evaluated(house, words, message):
    answer = jobs.here(str(house / "run/checkpoints"), *words, verb="eval")
    assert answer.code == 1 and message in answer.err
