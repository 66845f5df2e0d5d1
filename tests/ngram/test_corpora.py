"""Models of characters and tokens; documents in buckets by perplexity, and kept by them."""

import json
import math

import numpy as np
import pytest
from reference_ngram import Model

from megatrain.cli.main import main
from megatrain.data.tokenizer import TokenizerError
from megatrain.ngram import load
from megatrain.ngram.buckets import Cutoffs, chosen, cutoffs_of, perplexities
from megatrain.ngram.filter import filter_files
from megatrain.ngram.fit import Settings, fit
from megatrain.ngram.units import spacing

FALLBACK = (0.5, 1.0, 1.5)


@pytest.mark.parametrize(
    ("units", "text", "spaced"),
    [
        ("words", b"a  b\n", b"a  b\n"),
        ("characters", "我 你a\n\n他".encode(), "我   你 a \n \n 他".encode()),
        ("characters", b"a\xffb\n", b"a \xff b \n"),
        ("bytes", b"ab\n\nc\n", b"97 98\n\n99\n"),
    ],
)
def test_units(units, text, spaced):
    assert spacing(units)(text) == spaced


def test_a_tokenizer_that_is_not_there():
    with pytest.raises(TokenizerError, match="cannot be read"):
        spacing("none.json")


@pytest.mark.parametrize("units", ["characters", "bytes"])
def test_models_of_units(tmp_path, units):
    text = "我你我他我你\n他我\nab 你\n".encode() * 3
    (tmp_path / "text").write_bytes(text)
    fit([tmp_path / "text"], tmp_path / "m.arpa", Settings(3, fallback=FALLBACK, units=units))
    model = Model(spacing(units)(text), 3, fallback=FALLBACK)
    (score,) = load(tmp_path / "m.arpa", units).score(["他我 你"])
    history, total = (b"<s>",), 0.0
    for word in [*spacing(units)("他我 你".encode()).split(), b"</s>"]:
        total += math.log10(model.score(history, word if (word,) in model.p else b"<unk>"))
        history = (*history, word)
    assert score.log10 == pytest.approx(total, abs=1e-4)
    assert (
        main(["ngram", "score", "--model", str(tmp_path / "m.arpa"), "--input", str(tmp_path / "text"), "--units", units]) == 0
    )


def test_percentiles():
    values = np.arange(1, 101, dtype=float)
    cuts = cutoffs_of(values)
    assert (cuts.middle, cuts.tail) == pytest.approx((30.7, 60.4))
    assert [cuts.bucket(value) for value in (30.6, 30.7, 60.3, 60.4, 100)] == ["head", "middle", "middle", "tail", "tail"]
    for bad in ((-1, 50), (60, 30), (0, 101)):
        with pytest.raises(ValueError, match="must rise from 0 to 100"):
            cutoffs_of(values, bad)
    with pytest.raises(ValueError, match="no document"):
        cutoffs_of(np.zeros(0))
    assert chosen(["head", "tail"]) == {"head", "tail"}
    with pytest.raises(ValueError, match="'good' is no bucket"):
        chosen(["good"])


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text").write_bytes(b"the cat sat on the mat\nthe dog sat on the log\n" * 10)
    fit([tmp_path / "text"], tmp_path / "m.arpa", Settings(3, fallback=FALLBACK))
    documents = ["the cat sat on the log", "the dog sat\non the mat", "mat the on sat", "zebra quantum\nfoo", "", "the cat"]
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents) + "\n")
    return tmp_path, documents


def test_perplexities_of_documents(corpus):
    """CCNet's: 10 ^ -(sum over lines / tokens), a sentence end a line among them."""
    folder, documents = corpus
    model = load(folder / "m.arpa")
    for value, text in zip(perplexities(model, documents), documents, strict=True):
        scores = list(model.score(text.split("\n")))
        assert value == pytest.approx(10 ** (-sum(s.log10 for s in scores) / sum(s.tokens for s in scores)), rel=1e-9)


def test_documents_are_kept_by_bucket(corpus, capsys):
    folder, documents = corpus
    words = ["data", "filter", "--ngram", str(folder / "m.arpa"), "--input", str(folder / "docs.jsonl"), "--output"]
    assert main([*words, str(folder / "good.jsonl"), "--keep", "head,middle"]) == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "good.jsonl").read_text().splitlines()]
    assert {row["bucket"] for row in rows} == {"head", "middle"} and "zebra quantum\nfoo" not in [row["text"] for row in rows]
    assert f"{len(rows)} of 6 documents" in said and "the tail at" in said
    assert [row["text"] for row in rows] == [text for text in documents if text in {row["text"] for row in rows}]
    assert main([*words, str(folder / "all.jsonl"), "--keep", "head, middle,tail"]) == 0
    assert len((folder / "all.jsonl").read_text().splitlines()) == 6
    capsys.readouterr()
    assert main([*words, str(folder / "cut.jsonl"), "--keep", "tail", "--cutoffs", "1", "2"]) == 0
    assert "the middle begins at perplexity 1.0, the tail at 2.0" in capsys.readouterr().out
    assert main([*words, str(folder / "x.jsonl"), "--keep", "best"]) == 1
    assert not (folder / "x.jsonl").exists() and not list(folder.glob(".*part"))
    assert Cutoffs(3, 5).bucket(4) == "middle"
    for bad in (("nan", "nan"), ("3", "nan"), ("5", "3"), ("-1", "3")):
        capsys.readouterr()
        assert main([*words, str(folder / "x.jsonl"), "--keep", "tail", f"--cutoffs={bad[0]}", bad[1]]) != 0
    with pytest.raises(ValueError, match="cutoffs 3 and nan must rise from 0"):
        Cutoffs(3, float("nan"))


def test_a_model_without_numbers_keeps_nothing_in_silence(corpus):
    folder, _ = corpus
    model = load(folder / "m.arpa")
    model.orders[0].log10[:] = np.nan
    with pytest.raises(ValueError, match="has a perplexity of nan: the model's numbers are damaged"):
        filter_files([folder / "docs.jsonl"], model, folder / "x.jsonl", frozenset(("head", "middle", "tail")))
    assert not (folder / "x.jsonl").exists()


def test_a_filter_does_not_write_over_what_it_reads(corpus, capsys):
    folder, _ = corpus
    read = folder / "docs.jsonl"
    before = read.read_bytes()
    words = ["--ngram", str(folder / "m.arpa"), "--input", str(read), "--output", str(folder / "." / read.name)]
    assert main(["data", "filter", *words, "--keep", "head"]) == 1
    assert "is read and written" in capsys.readouterr().err and read.read_bytes() == before
