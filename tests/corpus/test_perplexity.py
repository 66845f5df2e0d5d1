"""Documents are judged by their perplexity: the same thresholds for any division, the right parts, languages without a model kept."""

import itertools
import json
import math
import random

import numpy as np
import pytest

from megatrain.cli.main import main
from megatrain.corpus import perplexity
from megatrain.corpus.document import Document, Tally
from megatrain.corpus.ngram_choices import LanguageModelConfig, PerplexityConfig
from megatrain.corpus.perplexity import (
    PerplexityScorer,
    Threshold,
    ThresholdsError,
    fit,
    identities,
    identity_of,
    merged,
    perplexity_step,
    read_thresholds,
    sample_of,
    write_thresholds,
)
from megatrain.ngram import load

TEXT = "the cat sat on the mat\na dog ran to the cat\n\nthe dog sat on a mat\n" * 4
HAN = "我你我他我你\n他你我\n" * 9
WORDS = ["the", "cat", "sat", "on", "mat", "a", "dog", "ran", "qx", "zz"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, text, units in (("en", TEXT, "words"), ("zh", HAN, "characters")):
        (folder / name).write_text(text)
        words = ["--order", "3", "--input", str(folder / name), "--arpa", str(folder / f"{name}.arpa"), "--units", units]
        assert main(["ngram", "fit", *words, "--discount-fallback", "--memory", "64M", "--workers", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def settings(folder):
    return make(folder)


def make(folder, **changed):
    models = (
        LanguageModelConfig("en", str(folder / "en.arpa")),
        LanguageModelConfig("zh", str(folder / "zh.arpa"), "characters"),
    )
    return PerplexityConfig(**{"models": models, **changed})


def pages(number=90):
    drawn = random.Random(7)
    for n in range(number):
        text = " ".join(drawn.choices(WORDS, k=12)) + "\n" + " ".join(drawn.choices(WORDS[: 4 + n % 7], k=5))
        yield Document(text, "web", "web.jsonl", n, language="en")
        if n % 3 == 0:
            yield Document("".join(drawn.choices("我你他她", k=9)), "web", "zh.jsonl", n, language="zh")


def test_a_score_is_the_models_whether_alone_or_together(folder, settings):
    alone, together = list(pages()), list(pages())
    scorer = PerplexityScorer(settings)
    for page in alone:
        scorer.score([page])
    assert list(PerplexityScorer(settings).scored(iter(together))) == alone
    model = load(folder / "en.arpa")
    page = alone[0]
    lines = list(model.score(page.text.split("\n")))
    mean = sum(line.log10 for line in lines) / sum(line.tokens for line in lines)
    assert page.scores["perplexity"] == pytest.approx(10**-mean, rel=1e-12)
    zh = load(folder / "zh.arpa", "characters")
    assert alone[1].scores["perplexity"] == pytest.approx(next(zh.score([alone[1].text])).perplexity, rel=1e-12)


def test_many_are_scored_at_once_and_none_is_held_back(settings, monkeypatch):
    monkeypatch.setattr(perplexity, "TOGETHER", 4)
    scored = PerplexityScorer(settings).scored(pages())
    first = list(itertools.islice(scored, 3))
    assert len(first) == 3 and len(first + list(scored)) == 120


def test_a_sample_is_of_the_smallest_hashes_for_any_division(settings):
    small = make_sample(settings, 20)
    whole = sample_of(pages(), small)
    assert {language: len(rows) for language, rows in whole.items()} == {"en": 20, "zh": 20}
    documents = list(pages())
    for parts in (2, 5):
        shuffled = random.Random(parts).sample(documents, len(documents))
        units = [json.loads(json.dumps(sample_of(shuffled[n::parts], small))) for n in range(parts)]
        assert merged(units, 20) == whole
        assert fit(units, small) == fit([whole], small)
    twice = sample_of([*pages(), *pages()], small)
    assert twice == whole  # copies are in it once


def make_sample(settings, number):
    return PerplexityConfig(settings.models, sample=number)


def test_thresholds_are_the_percentiles_of_the_sample(settings):
    found = fit([sample_of(pages(), settings)], settings)
    assert list(found) == ["en", "zh"]
    scored = list(PerplexityScorer(settings).scored(pages()))
    values = [page.scores["perplexity"] for page in scored if page.language == "en"]
    assert found["en"].documents == len({page.text for page in scored if page.language == "en"}) == 90
    assert (found["en"].middle, found["en"].tail) == tuple(np.percentile(values, [30, 60]).tolist())
    assert len(found["en"].model) == 32 and (found["en"].units, found["zh"].units) == ("words", "characters")


def test_the_parts_of_a_corpus_are_its_percentiles(settings):
    step, tally = perplexity_step(settings, fit([sample_of(pages(), settings)], settings)), Tally()
    refused = [tuple(step(page, tally)) for page in pages() if page.language == "en"]
    assert {key: value for key, value in tally.counts.items() if not key.startswith("perplexity/")} == {
        "perplexity.head/en": 27,
        "perplexity.middle/en": 27,
        "perplexity.tail/en": 36,
    }
    assert refused.count(("perplexity.tail",)) == 36 and refused.count(()) == 54
    assert sum(number for name, number in tally.counts.items() if name.startswith("perplexity/en/")) == 90


def test_a_document_bears_its_score_and_its_part(settings):
    thresholds = {"en": Threshold(5.0, 8.0, 9, "", "words")}
    usual, rare = (Document(text, "web", "f", 0, language="en") for text in ("the cat sat on the mat", "qx qx qx"))
    step = perplexity_step(PerplexityConfig(settings.models, keep=("tail",)), thresholds)
    assert (step(usual, Tally()), step(rare, Tally())) == (("perplexity.head",), ())
    assert usual.marks == {"perplexity_part": "head"} and rare.marks == {"perplexity_part": "tail"}
    assert usual.scores["perplexity"] < 5 < 8 <= rare.scores["perplexity"]


def test_documents_without_a_model_or_thresholds_are_kept_and_counted(settings):
    step, tally = perplexity_step(settings, {}), Tally()
    for language, kind in (("fr", "text"), ("", "text"), ("en", "code"), ("en", "text")):
        assert step(Document("the cat", "web", "f", 0, kind, language), tally) == ()
    counts = {name: number for name, number in tally.counts.items() if not name.startswith("perplexity/")}
    assert counts == {
        "perplexity.no_model/fr": 1,
        "perplexity.no_model/?": 1,
        "perplexity.no_model/code": 1,
        "perplexity.no_threshold/en": 1,
    }
    assert sample_of([Document("x", "web", "f", 0, language="fr")], settings) == {}
    code = PerplexityConfig((LanguageModelConfig("code", settings.models[0].path),))
    assert list(sample_of([Document("x", "web", "f", 0, "code", "en")], code)) == ["code"]


def test_thresholds_are_written_down_and_read_again(tmp_path, settings):
    found = fit([sample_of(pages(), settings)], settings)
    write_thresholds(tmp_path / "t.json", found)
    assert read_thresholds(tmp_path / "t.json", settings) == found
    half = fit([sample_of((page for page in pages() if page.language == "en"), settings)], settings)
    write_thresholds(tmp_path / "t.json", half)  # no document of Chinese: they are kept and counted, here and later
    again = read_thresholds(tmp_path / "t.json", settings)
    assert again == half and (again["zh"].documents, again["en"]) == (0, found["en"])
    tally = Tally()
    assert perplexity_step(settings, again)(Document("我", "web", "f", 0, language="zh"), tally) == ()
    assert tally.counts["perplexity.no_threshold/zh"] == 1


def test_thresholds_of_other_models_are_refused(tmp_path, folder, settings):
    path = tmp_path / "t.json"
    write_thresholds(path, fit([sample_of(pages(), settings)], settings))
    other = tmp_path / "other.arpa"
    other.write_text((folder / "en.arpa").read_text() + "\n")
    for model, said in (
        (LanguageModelConfig("en", str(other)), "was found with another model of en than .*other.arpa"),
        (LanguageModelConfig("zh", str(folder / "zh.arpa")), "was found with units characters for zh, not words"),
        (LanguageModelConfig("de", str(other)), "has no thresholds of language de. Leave perplexity.thresholds out"),
    ):
        with pytest.raises(ThresholdsError, match=said):
            read_thresholds(path, PerplexityConfig((model,)))
    for text in ("", "[]", '{"languages": {"en": {"middle": 1}}}', '{"languages": {"en": 3}}', "[" * 9999):
        path.write_text(text)
        with pytest.raises(ThresholdsError, match=r"t\.json: these are no thresholds of perplexity"):
            read_thresholds(path, settings)
    falling = {"en": Threshold(9.0, 3.0, 1, "", "words")}
    write_thresholds(path, falling)
    with pytest.raises(ThresholdsError, match="cutoffs 9 and 3 must rise from 0"):
        read_thresholds(path, settings)


def test_a_compiled_model_is_known_by_its_header_and_by_its_tokenizer(tmp_path, folder):
    """The header has a checksum of all checksums; nothing else of a large model is read."""
    compiled, tokenizer = tmp_path / "en.bin", tmp_path / "tokenizer.json"
    assert main(["ngram", "compile", str(folder / "en.arpa"), str(compiled)]) == 0
    model = LanguageModelConfig("en", str(compiled))
    known = identity_of(model)
    data = bytearray(compiled.read_bytes())
    data[-1] ^= 1
    compiled.write_bytes(data)
    assert identity_of(model) == known
    data[40] ^= 1
    compiled.write_bytes(data)
    assert identity_of(model) != known
    tokenizer.write_text("{}")
    counted = [identity_of(LanguageModelConfig("en", str(compiled), units)) for units in ("words", "bytes", str(tokenizer))]
    assert len(set(counted)) == 2
    tokenizer.write_text("{ }")
    settings = PerplexityConfig((LanguageModelConfig("en", str(compiled), str(tokenizer)),), thresholds=str(tokenizer))
    assert identities(settings)[0] not in counted and len(identities(settings)) == 2


def test_wrong_settings_are_said(folder):
    twice = PerplexityConfig((LanguageModelConfig("en", "a"), LanguageModelConfig("en", "b")))
    with pytest.raises(ValueError, match=r"perplexity\.models has two models of language en"):
        PerplexityScorer(twice)
    falling = make(folder, percentiles=(60.0, 30.0))
    with pytest.raises(ValueError, match="percentiles 60 and 30 must rise"):
        fit([sample_of(pages(9), falling)], falling)


def test_a_damaged_model_names_the_document(settings, monkeypatch):
    monkeypatch.setattr(perplexity, "perplexities", lambda _model, texts: [math.nan for _ in texts])
    with pytest.raises(ValueError, match=r"^w\.jsonl:7 has a perplexity of nan: the model's numbers are damaged\."):
        PerplexityScorer(settings).score([Document("the cat", "web", "w.jsonl", 7, language="en")])
