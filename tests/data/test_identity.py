"""What tells texts from others: blocks spread over a store of any size, answers too."""

import json

import jobs
import numpy as np
import pytest
from tokenizer_models import sentencepiece

from megatrain.config.schema import Config, CorpusConfig, DataConfig, GlmConfig
from megatrain.data import unchanged
from megatrain.data.identity import (
    identity_of,
    listed,
    other_corpora,
    other_held_out,
    other_special,
    other_terms,
    same_store,
    sampled,
    store_identity,
)


def change(path, at):
    """Change one byte of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_every_byte_of_a_small_store_counts(tmp_path):
    store = jobs.write_store(tmp_path / "store")
    first = store_identity(store)
    assert first.startswith("2042-8000-")
    jobs.write_store(tmp_path / "copy")
    assert store_identity(tmp_path / "copy") == first
    for at in (0, 3999, 7999):
        change(tmp_path / "store.bin", at)
        assert store_identity(store) != first
        change(tmp_path / "store.bin", at)
    assert store_identity(store) == first


def test_of_a_large_file_blocks_are_read_that_lie_all_over_it(tmp_path):
    """1 TiB, of which the file system has nothing: 2 MiB are read, the first byte and the last one among them."""
    path, size = tmp_path / "large", 2**40 + 12345
    with path.open("wb") as file:
        file.truncate(size)
    zeros = sampled(path)
    assert len(zeros) == 2**21 == unchanged.BLOCKS * unchanged.BLOCK_BYTES
    gap = (size - unchanged.BLOCK_BYTES) // (unchanged.BLOCKS - 1)
    for at in (0, size - 1, 50 * gap + 100):
        change(path, at)
        assert sampled(path) != zeros
        change(path, at)
    change(path, gap // 2)
    assert sampled(path) == zeros  # between blocks nobody looks


def test_an_identity_of_an_earlier_release_is_compared_as_far_as_it_goes():
    assert same_store("10-20-ab", "10-20-ab-cd") and same_store("10-20-ab-cd", "10-20-ab-cd")
    assert not same_store("10-20-ab-cd", "10-20-ab-ce") and not same_store("10-21-ab", "10-20-ab-cd")


@pytest.fixture
def corpora(tmp_path):
    """Prompts with answers, and a text."""
    for name in ("prompts", "answers", "text"):
        jobs.write_store(tmp_path / name)
    return (CorpusConfig(f"{tmp_path}/prompts", answers=f"{tmp_path}/answers"), CorpusConfig(f"{tmp_path}/text", 0.5))


def of(corpora, valid=()):
    return identity_of(Config(data=DataConfig(train=corpora, valid=valid)))


def test_other_answers_are_noticed(tmp_path, corpora):
    was = of(corpora)["data"]
    assert list(other_corpora(was, of(corpora)["data"], corpora)) == []
    tokens = np.fromfile(tmp_path / "answers.bin", np.uint16)
    tokens[7] ^= 1
    tokens.tofile(tmp_path / "answers.bin")
    now = of(corpora)["data"]
    assert list(other_corpora(was, now, corpora)) == [
        f"data.train[0].answers={tmp_path}/answers are others: {was[0][2]} -> {now[0][2]}"
    ]
    without = (CorpusConfig(f"{tmp_path}/prompts"), corpora[1])
    (line,) = other_corpora(was, of(without)["data"], without)
    assert line == f"data.train[0].answers=null are others: {was[0][2]} -> null"
    old = [[row[0].rpartition("-")[0], row[1]] for row in was]
    assert list(other_corpora(old, now, corpora)) == []


def test_weights_and_order_count(corpora):
    was, turned = of(corpora)["data"], corpora[::-1]
    said = list(other_corpora(was, of(turned)["data"], turned))
    assert [line.partition(":")[0] for line in said] == [
        "data.train[0].weight",  # the texts are the same here
        f"data.train[0].answers={turned[0].answers or 'null'} are others",
        "data.train[1].weight",
        f"data.train[1].answers={turned[1].answers or 'null'} are others",
    ]
    assert list(other_corpora(was, was[:1], corpora[:1])) == ["data.train has 1 corpora, and had 2"]


def test_how_often_a_corpus_is_seen_counts():
    was = [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 1.0, "max_epochs": 2.0, "name": "x"}]
    now = [{"path": "a", "weight": 1.0, "old": True}, {"path": "b", "weight": 1.0, "epochs": 3.0, "name": "y"}]
    assert list(other_terms(was, now)) == [
        "data.train[0].old: null -> true",
        "data.train[1].epochs: null -> 3.0",
        "data.train[1].max_epochs: 2.0 -> null",
    ]
    assert list(other_terms(["a", 3], now[:1])) == ["data.train[0].old: null -> true"], "whatever a manifest holds"


def test_held_out_text_has_names_and_contents(tmp_path, corpora):
    text = CorpusConfig(f"{tmp_path}/text", set="web")
    was = of(corpora, (text,))["valid"]
    assert was == [["web", store_identity(f"{tmp_path}/text")]]
    assert not other_held_out(was, of(corpora, (text,))["valid"])
    assert other_held_out(was, of(corpora, (CorpusConfig(f"{tmp_path}/text", set="code"),))["valid"])
    assert other_held_out(was, [])
    change(tmp_path / "text.bin", 11)
    assert other_held_out(was, of(corpora, (text,))["valid"])


@pytest.mark.parametrize("objective", ["gpt", "glm"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
def test_files_beside_a_tokenizer_count_by_what_they_lead_to(tmp_path, file, objective):
    """Without them </s>, of id 2, ends a document, by its name."""
    path = tmp_path / "tokenizer.json"
    sentencepiece().save(str(path))
    a = sentencepiece().token_to_id("a")
    config = Config(data=DataConfig(tokenizer=str(path), objective=objective, glm=GlmConfig()))
    was = identity_of(config)
    eos = {"glm.tokens.eos"} if objective == "glm" else set()
    assert {name: was["special"][name] for name in ("eod", "stops", *eos)} == {"eod": 2, "stops": [2]} | dict.fromkeys(eos, 2)
    (tmp_path / file).write_text(json.dumps({"padding_side": "left", "temperature": 0.5}))
    assert identity_of(config) == was  # nothing that a run depends on
    (tmp_path / file).write_text(json.dumps({"eos_token": "a"} if "gen" not in file else {"eos_token_id": a}))
    now = identity_of(config)
    assert now["tokenizer"] == was["tokenizer"]
    told = list(other_special(was["special"], now["special"], "T"))
    end = ", by data.eod, data.bos, or tokenizer_config.json, special_tokens_map.json and generation_config.json beside it"
    lines = [("eod", 2, a), ("stops", "[2]", f"[{a}]"), *((name, 2, a) for name in eos)]
    assert told == [f"special token {name} of data.tokenizer=T: {x} -> {y}{end}" for name, x, y in lines]
    differing = [y for x, y in zip(*(listed(config, of).splitlines() for of in (was, now)), strict=True) if x != y]
    assert differing == [f"special token {name} of data.tokenizer={path}: {y}" for name, _, y in lines]
    assert list(other_special({}, now["special"], "T")) == []  # of an earlier release


def test_a_token_that_is_not_clear_is_told_apart_from_one_that_is(tmp_path):
    path = tmp_path / "tokenizer.json"
    sentencepiece().save(str(path))
    config = Config(data=DataConfig(tokenizer=str(path)))
    was = identity_of(config)["special"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>", "bos_token": "nothing that it has"}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    now = identity_of(config)["special"]
    assert (was["eod"], was["bos"], now) == (2, 1, {"eod": "not clear", "bos": "not clear"})
