"""Tokens a word and bytes a token, by source and tokenizer."""

import json
from pathlib import Path

import pytest

from megatrain.cli.main import main
from megatrain.data.tokenizers.fertility import measure_fertility
from megatrain.data.tokenizers.fitting import train_tokenizer


@pytest.fixture(autouse=True)
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = ["one two  three\n", "four", ""]
    Path("en.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    Path("zh.txt").write_text("我们 go 散步", encoding="utf-8")


def test_words_of_blanks_and_characters_of_chinese():
    counts = measure_fertility(["bytes"], {"en": ["en.jsonl"], "zh": ["zh.txt"]}).counts["bytes"]
    assert [(c.documents, c.text_bytes, c.words, c.tokens) for c in counts.values()] == [
        (3, 19, 4, 19),
        (1, 16, 5, 16),
        (4, 35, 9, 35),
    ]
    assert list(counts) == ["en", "zh", "all"]
    assert (counts["zh"].tokens_a_word, counts["zh"].bytes_a_token) == (3.2, 1.0)
    assert counts["en"].used.sum() == len(set(b"one two  three\nfour"))


def test_a_table_of_several_tokenizers_side_by_side(capsys):
    train_tokenizer(["en.jsonl"], 259, "t.json")
    assert main(["data", "fertility", "--tokenizer", "bytes", "t.json", "--input", "zh.txt", "--source", "en", "en.jsonl"]) == 0
    first, second, empty, *table = capsys.readouterr().out.splitlines()
    assert first == "[1] bytes: 257 tokens" and empty == ""
    assert second.startswith("[2] t.json: 259 tokens, bpe, trained on 3 documents, 19 bytes (hash ")
    assert table[0].replace(" [", "[").split() == [
        "source", "documents", "bytes", "words", *(f"{of}[{n}]" for of in ("tokens/word", "bytes/token", "used") for n in (1, 2)),
    ]  # fmt: skip
    assert [line.split() for line in table[1:]] == [
        ["zh.txt", "1", "16", "5", "3.20", "3.20", "1.00", "1.00", "5%", "5%"],
        ["en", "3", "19", "4", "4.75", "4.00", "1.00", "1.19", "4%", "5%"],
        ["all", "4", "35", "9", "3.89", "3.56", "1.00", "1.09", "9%", "9%"],
    ]
    assert len({len(line) for line in table}) == 1


def test_a_sample_is_the_same_for_all_tokenizers():
    Path("many.jsonl").write_text("".join(json.dumps({"text": f"text {n:04}"}) + "\n" for n in range(500)))
    train_tokenizer(["many.jsonl"], 300, "t.json")
    counts = measure_fertility(["bytes", "t.json"], {"many": ["many.jsonl"]}, sample=900).counts
    assert [(c["many"].documents, c["many"].text_bytes, c["many"].words) for c in counts.values()] == [(100, 900, 200)] * 2


def test_nothing_to_measure_is_said(capsys):
    assert main(["data", "fertility", "--tokenizer", "bytes"]) == 1
    assert "there is nothing to measure: give --tokenizer FILE... and --input FILE..." in capsys.readouterr().err
    Path("empty.txt").write_text("")
    assert str(measure_fertility(["bytes"], {"empty": ["empty.txt"]})).splitlines()[-1].split() == [
        "empty", "1", "0", "0", "0.00", "0.00", "0%",
    ]  # fmt: skip
