"""Models equal those of an independent implementation with dictionaries, line for line; the worked example to its figures."""

import gzip
import math
from concurrent.futures.process import BrokenProcessPool
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_ngram import Failed, Model

from megatrain.ngram import grams
from megatrain.ngram.discounts import DiscountError, parse_fallback
from megatrain.ngram.fit import Settings, WorkerError, fit
from megatrain.ngram.text import TextError

FALLBACK = (0.5, 1.0, 1.5)
EXAMPLE = "我 你 我 他 我 你\n".encode()


def fitted(folder, text, name="m.arpa", **settings):
    """(what fit says, the lines of its file)."""
    (folder / "text").write_bytes(text)
    report = fit([folder / "text"], folder / name, Settings(**settings))
    data = (folder / name).read_bytes()
    return report, (gzip.decompress(data) if name.endswith(".gz") else data).split(b"\n")


def sections(lines):
    """order -> [(log10 p, words, backoff or None)]."""
    found, k = {}, 0
    for line in lines:
        if line.startswith(b"\\") and line.endswith(b"-grams:"):
            k = int(line[1:-7])
            found[k] = []
        elif k and b"\t" in line:
            p, words, *backoff = line.split(b"\t")
            found[k].append((float(p), tuple(words.split(b" ")), float(backoff[0]) if backoff else None))
    return found


def same(found, model, tolerance=1e-5):
    for k in range(1, model.order + 1):
        wanted = list(model.lines(k))
        assert [line[1] for line in found[k]] == [line[1] for line in wanted]
        for (p, _, b), (q, words, c) in zip(found[k], wanted, strict=True):
            assert p == pytest.approx(q, abs=tolerance), words
            assert (b is None) == (c is None) and (b is None or b == pytest.approx(c, abs=tolerance)), words


def test_the_worked_example(tmp_path):
    report, lines = fitted(tmp_path, EXAMPLE, order=2, fallback=FALLBACK)
    assert lines[:6] == [b"\\data\\", b"ngram 1=6", b"ngram 2=6", b"", b"\\1-grams:", b"-1\t<unk>\t0"]
    assert lines[-3:] == [b"", b"\\end\\", b""]
    found = sections(lines)
    expected = {
        1: [
            *((-1, "<unk>", 0), (0, "<s>", -0.30103), (-0.7367586, "</s>", 0)),
            *((-0.45593196, "我", -0.30103), (-0.7367586, "你", -0.30103), (-0.7367586, "他", -0.30103)),
        ],
        2: [
            *((-0.4663974, "你 </s>", None), (-0.17069621, "<s> 我", None), (-0.37161106, "你 我", None)),
            *((-0.17069621, "他 我", None), (-0.37161106, "我 你", None), (-0.5878196, "我 他", None)),
        ],
    }
    for k, wanted in expected.items():
        for (p, words, b), (q, text, c) in zip(found[k], wanted, strict=True):
            assert words == tuple(text.encode().split()) and p == pytest.approx(q, abs=1e-6)
            assert b == c or b == pytest.approx(c, abs=1e-6)
    assert report.tokens == 7 and report.types == 6 and all(d.fallback for d in report.discounts)


def test_probabilities_of_the_worked_example(tmp_path):
    _, lines = fitted(tmp_path, EXAMPLE, order=2, fallback=FALLBACK)
    p = {words: 10**value for section in sections(lines).values() for value, words, _ in section}
    for words, value in {"我": 0.35, "你": 0.183333333, "我 你": 0.425, "我 他": 0.258333333, "你 </s>": 0.341666667}.items():
        assert p[tuple(words.encode().split())] == pytest.approx(value, abs=1e-6)


def test_the_last_ngram_is_counted_by_its_raw_count(tmp_path):
    """The smallest text where it shows: without it unigrams would have the discounts 0.5, 0.5, 3."""
    report, lines = fitted(tmp_path, b"a\nb\nb\nc b\nc\n", order=2, fallback=FALLBACK)
    assert report.discounts[0].values == pytest.approx((0.2, 1.7, 3.0))
    same(sections(lines), Model(b"a\nb\nb\nc b\nc\n", 2, fallback=FALLBACK))


words = st.sampled_from([b"a", b"b", b"c", b"dd", b"e\xff", "字".encode()])
texts = st.lists(st.lists(words, max_size=7).map(b" ".join), min_size=1, max_size=14).map(
    lambda lines: b"\n".join(lines) + b"\n"
)


@settings(max_examples=150, deadline=None)
@given(
    text=texts,
    order=st.integers(1, 5),
    prune=st.lists(st.integers(0, 2), max_size=3).map(sorted).map(tuple),
    unigrams=st.booleans(),
    pad=st.sampled_from([0, 40]),
    workers_memory=st.sampled_from([1 << 30, 1]),
)
def test_random_texts(tmp_path_factory, text, order, prune, unigrams, pad, workers_memory):
    prune = prune[:order]
    folder = tmp_path_factory.mktemp("random")
    pad = pad if unigrams else 0
    given_settings = {"order": order, "prune": prune, "fallback": FALLBACK, "interpolate_unigrams": unigrams, "vocab_pad": pad}
    _, lines = fitted(folder, text, memory=workers_memory, **given_settings)
    model = Model(text, order, prune, FALLBACK, unigrams, pad)
    same(sections(lines), model)
    if pad:
        return  # then a part belongs to words that have no line
    for history in [(b"<s>",), (b"a",), (b"<s>", b"b", b"a"), (b"c", b"dd"), (b"zz",)]:
        kept = [w for w in model.ids if (w,) in model.p and w != b"<s>"]
        assert sum(model.score(history, w) for w in kept) == pytest.approx(1.0, abs=1e-9)


SOME = [(1, ()), (2, (1, 2)), (3, (0, 0, 1)), (4, ()), (5, (1, 2)), (10, (0, 0, 1))]
REST = [pair for pair in product([1, 2, 3, 4, 5, 10], [(), (0, 0, 1), (1, 2)]) if pair not in SOME]


@pytest.mark.parametrize(("order", "prune"), [*SOME, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in REST)])
def test_a_larger_text(tmp_path, monkeypatch, order, prune):
    """Many parts, several stretches of text, several ranges of contexts, two processes; estimated discounts."""
    prune = prune[:order]
    draw = np.random.default_rng(order)
    rows = [b" ".join(b"w%d" % int(n) for n in draw.zipf(1.4, draw.integers(0, 25)) if n < 300) for _ in range(1200)]
    text = b"\n".join(rows) + b"\n"
    monkeypatch.setattr(grams, "SCAN", 1000)
    monkeypatch.setattr("megatrain.ngram.tables.SCAN", 1000)
    _, lines = fitted(tmp_path, text, order=order, prune=prune, fallback=FALLBACK, memory=1)
    model = Model(text, order, prune, FALLBACK)
    same(sections(lines), model)
    (tmp_path / "again").mkdir()
    _, again = fitted(tmp_path / "again", text, order=order, prune=prune, fallback=FALLBACK, workers=2, memory=1 << 28)
    assert again == lines


@pytest.mark.parametrize(
    "text",
    [
        b"a b",
        b"a\0b\tc\r\nd",
        b"\n\n\n",
        b"one",
        b"a " * 5000,
        b"\xff\xfe broken \x80\n",
        " a\u3000b\u00a0c\n".encode(),
        b"x" * 200_000,
    ],
)
def test_texts_nobody_thought_of(tmp_path, text):
    _, lines = fitted(tmp_path, text, order=3, fallback=FALLBACK)
    same(sections(lines), Model(text, 3, fallback=FALLBACK))


def test_small_pieces_make_the_same_model(tmp_path, monkeypatch):
    text = b"a bb  ccc\n\ndddd\te\rf\n a bb\nccc dddd e" * 20
    _, lines = fitted(tmp_path, text, order=3, fallback=FALLBACK)
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr("megatrain.ngram.text.CHUNK_BYTES", size)
        assert fitted(tmp_path, text, order=3, fallback=FALLBACK)[1] == lines


def test_compressed_output(tmp_path):
    _, lines = fitted(tmp_path, EXAMPLE, order=2, fallback=FALLBACK)
    assert fitted(tmp_path, EXAMPLE, "m.arpa.gz", order=2, fallback=FALLBACK)[1] == lines


@pytest.mark.parametrize("word", [b"<s>", b"</s>", b"<unk>"])
def test_words_that_models_keep_are_refused(tmp_path, word):
    with pytest.raises(TextError, match="which a model keeps for itself"):
        fitted(tmp_path, b"a b\nc " + word + b" d\n", order=2, fallback=FALLBACK)
    assert not list(tmp_path.glob("ngram-*")) and not (tmp_path / "m.arpa").exists()


def test_marks_of_sentences_are_blanks_where_that_is_asked_for(tmp_path):
    plain, marked = b"a b c\n\nb <s>a c\nc a\n", b"<s> a b c </s>\n<s> </s>\n<s> b <unk> <s>a c</s> </s>\nc <s> a"
    marked = marked.replace(b"c</s>", b"c")
    for name, text, skip in (("plain", plain, False), ("marked", marked, True)):
        (tmp_path / name).write_bytes(text)
        fit([tmp_path / name], tmp_path / f"{name}.arpa", Settings(2, fallback=FALLBACK, skip_symbols=skip))
    assert (tmp_path / "marked.arpa").read_bytes() == (tmp_path / "plain.arpa").read_bytes()
    with pytest.raises(TextError, match=r"the text has the word <s>.*Give --skip-symbols"):
        fit([tmp_path / "marked"], tmp_path / "m.arpa", Settings(2, fallback=FALLBACK))
    with pytest.raises(ValueError, match=r"--skip-symbols is about words, and --units characters divides them"):
        fit([tmp_path / "marked"], tmp_path / "m.arpa", Settings(2, fallback=FALLBACK, skip_symbols=True, units="characters"))


def test_an_empty_text_is_refused(tmp_path):
    with pytest.raises(TextError, match="there is no text"):
        fitted(tmp_path, b"", order=2)


def test_counts_without_discounts_are_refused(tmp_path):
    with pytest.raises(DiscountError, match=r"no 1-gram has the adjusted count 2.*--discount-fallback"):
        fitted(tmp_path, EXAMPLE, order=2)
    with pytest.raises(Failed):
        Model(EXAMPLE, 2)
    assert not list(tmp_path.glob("ngram-*")) and not list(tmp_path.glob(".m.arpa*"))


def test_fallbacks():
    assert parse_fallback(None) is None
    assert parse_fallback([]) == (0.5, 1.0, 1.5)
    assert parse_fallback([0.4]) == (0.4, 0.4, 0.4)
    assert parse_fallback([0.4, 1.2]) == (0.4, 1.2, 1.2)
    for bad in ([0], [1.5], [0.5, 2.5], [0.5, 1, 4], [1, 1, 1, 1], [math.nan]):
        with pytest.raises(ValueError, match="--discount-fallback"):
            parse_fallback(bad)


def test_a_process_that_is_gone_is_said(tmp_path, monkeypatch):
    class Pool:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def map(self, *_):
            raise BrokenProcessPool("gone")

    monkeypatch.setattr("megatrain.ngram.fit.ProcessPoolExecutor", Pool)
    text = b"\n".join(b"w%d w%d" % (n % 700, n % 11) for n in range(4000)) + b"\n"
    with pytest.raises(WorkerError, match="Give less --memory, or --workers 1"):
        fitted(tmp_path, text, order=2, fallback=FALLBACK, workers=2, memory=1)
    assert not list(tmp_path.glob("ngram-*"))


def test_padding_needs_a_uniform_distribution(tmp_path):
    with pytest.raises(ValueError, match="Leave one out"):
        fitted(tmp_path, EXAMPLE, order=2, fallback=FALLBACK, vocab_pad=10, interpolate_unigrams=False)


@pytest.mark.parametrize("bad", [{"prune": (1, 0)}, {"prune": (-1,)}, {"prune": (0, 0, 0)}, {"order": 0}, {"order": 11}])
def test_settings_that_cannot_be(tmp_path, bad):
    with pytest.raises(ValueError, match=r"--prune|--order"):
        fitted(tmp_path, EXAMPLE, **{"order": 2, "fallback": FALLBACK, **bad})
