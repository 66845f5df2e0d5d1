"""Scores are those of backing off by hand, whatever made the file; tables answer what was put into them."""

import bz2
import gzip
import lzma
import math
from functools import partial

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_ngram import Model, sentences

from megatrain.ngram import load
from megatrain.ngram.arpa_in import ArpaError, read_arpa
from megatrain.ngram.fit import Settings, fit
from megatrain.ngram.report import report
from megatrain.ngram.table import EMPTY, MISSING, Table
from megatrain.ngram.text import TextError

FALLBACK = (0.5, 1.0, 1.5)
EXAMPLE = "我 你 我 他 我 你\n".encode()


def arpa_of(folder, text, order=3, prune=()):
    (folder / "text").write_bytes(text)
    fit([folder / "text"], folder / "m.arpa", Settings(order, prune, FALLBACK))
    return folder / "m.arpa"


def by_hand(model, line, bos=True, eos=True):
    """(log10, tokens, unknown words, their log10) of a line."""
    (words,) = sentences(line + b"\n")
    history, total, oov, missed = ((b"<s>",) if bos else ()), 0.0, 0, 0.0
    for word in [*words, *([b"</s>"] if eos else [])]:
        known = (word,) in model.p and word != b"<unk>"
        value = math.log10(model.score(history, word if known else b"<unk>"))
        total += value
        if not known:
            oov, missed = oov + 1, missed + value
        history = (*history, word if known else b"<unk>")
    return total, len(words) + eos, oov, missed


words = st.sampled_from([b"a", b"b", b"c", b"dd", b"e\xff", "字".encode(), b"new", b"<unk>"])
lines = st.lists(st.lists(words, max_size=7).map(b" ".join), min_size=1, max_size=12)


@settings(max_examples=120, deadline=None)
@given(
    text=st.lists(
        st.lists(st.sampled_from([b"a", b"b", b"c", b"dd", b"e\xff"]), max_size=7).map(b" ".join), min_size=1, max_size=12
    ),
    asked=lines,
    order=st.integers(1, 5),
    prune=st.sampled_from([(), (0, 1), (0, 0, 1), (1,)]),
    bos=st.booleans(),
    eos=st.booleans(),
)
def test_scores_are_those_of_backing_off(tmp_path_factory, text, asked, order, prune, bos, eos):
    folder = tmp_path_factory.mktemp("score")
    data = b"\n".join(text) + b"\n"
    path = arpa_of(folder, data, order, prune[:order])
    model = Model(data, order, prune[:order], FALLBACK)
    for got, line in zip(load(path).score(asked, bos=bos, eos=eos), asked, strict=True):
        total, tokens, oov, missed = by_hand(model, line, bos, eos)
        assert (got.tokens, got.oov) == (tokens, oov)
        assert got.log10 == pytest.approx(total, abs=2e-4) and got.log10_oov == pytest.approx(missed, abs=2e-4)


def test_the_worked_example(tmp_path):
    (score,) = load(arpa_of(tmp_path, EXAMPLE, 2)).score(["我 你"])
    assert score.log10 == pytest.approx(-0.17069621 - 0.37161106 - 0.4663974, abs=1e-5)
    assert score.tokens == 3 and score.oov == 0 and score.perplexity == pytest.approx(10 ** (1.00870467 / 3), abs=1e-4)
    (score,) = load(tmp_path / "m.arpa").score(["谁"])
    assert score.oov == 1 and score.log10_oov == pytest.approx(-1 - 0.30103, abs=1e-5)


SRILM = b"""

\\data\\
ngram 1=4
ngram 2=2
ngram 3=1

\\1-grams:
-99 <s> -0.5
-1.0 </s>
-0.4 a -0.2
-0.6\tb\t-0.1

\\2-grams:
-0.3 <s> a -0.7
-0.2 a b

\\3-grams:
-0.05 <s> a </s>

\\end\\
"""


def test_other_dialects_and_suffixes_that_pruning_took(tmp_path):
    """Back-offs that are left out are 0; `a </s>` is no bigram here, and weighs what backing off gives it."""
    (tmp_path / "m.arpa").write_bytes(SRILM)
    frames = zstandard.compress(SRILM[:100]) + zstandard.compress(SRILM[100:])
    packed = {"m.arpa.gz": gzip.compress(SRILM), "m.xz": lzma.compress(SRILM), "m.bz2": bz2.compress(SRILM), "m.zst": frames}
    for name, data in packed.items():
        (tmp_path / name).write_bytes(data)
    for name in ("m.arpa", *packed):
        model = load(tmp_path / name)
        first, second, third, unknown = model.score(["a", "a b", "b a", "x"])
        assert first.log10 == pytest.approx(-0.3 - 0.05)
        assert second.log10 == pytest.approx(-0.3 + (-0.7 - 0.2) + (0 - 0.1 - 1.0))
        assert third.log10 == pytest.approx((-0.5 - 0.6) + (-0.1 - 0.4) + (-0.2 - 1.0))
        assert unknown.log10_oov == pytest.approx(-0.5 - 100) and unknown.oov == 1


def changed(old, new):
    return SRILM.replace(old, new, 1)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (SRILM[:-8], "ends after line"),
        (SRILM[:120], "is cut short|is no number"),
        (changed(b"ngram 2=2", b"ngram 2=1"), "the header gives another number"),
        (changed(b"-0.2 a b", b"-0.2 a q"), "has the word b'q', which is not among"),
        (changed(b"-0.2 a b", b"0.2 a b"), "above 0"),
        (changed(b"-0.2 a b", b"x a b"), r"m\.arpa:16: b'x' is no number"),
        *(
            (changed(b"-0.2 a b", b"%b a b" % bad), rf"m\.arpa:16: b'{bad.decode()}' is no number")
            for bad in (b"nan", b"-inf", b"inf", b"-1e39", b"-1_0", b"infinity")
        ),
        (changed(b"-0.3 <s> a -0.7", b"-0.3 <s> a nan"), r"m\.arpa:15: b'nan' is no number that a model can have"),
        (changed(b"-0.4 a -0.2", b"-0.4 a inf"), r"m\.arpa:11: b'inf' is no number.*0 is written as -99"),
        (changed(b"-0.2 a b", b"-0.2 a b -1 -2"), "is no 2-gram: 3 or 4 fields"),
        (changed(b"-0.6\tb\t-0.1", b"-0.6\ta\t-0.1"), r"m\.arpa:12: the word `a` is there twice .*first in line 11"),
        (changed(b"\\data\\", b"\\date\\"), r"no \\data\\ in the first 1000 lines: this is no ARPA file \(it begins with b'"),
        (SRILM.decode().encode("utf-16"), r"m\.arpa: this is UTF-16, not UTF-8"),
        (gzip.compress(SRILM.decode().encode("utf-16"), mtime=0), r"m\.arpa: this is UTF-16, not UTF-8"),
        (changed(b"ngram 1=4", b"ngram one=4"), "where a count such as"),
        (changed(b"ngram 1=4", b"ngram 1=" + b"9" * 6000), r"m\.arpa:\d+: b'ngram 1=99.*where a count such as"),
        (changed(b"ngram 2=2", b"ngram 2=3"), r"m\.arpa:\d+: b'.*' where a 2-gram was expected: the header gives more"),
        (changed(b"ngram 3=1", b"".join(b"ngram %d=1\n" % n for n in range(3, 40))), r"b'ngram 33=1' where a count"),
        (
            changed(b"-0.2 a b", b"-0.2 a " + b"b" * (9 << 20)),
            r"m\.arpa:16: a line of more than 1,048,576 bytes, beginning with b'-0\.2 a b",
        ),
        (changed(b"-0.2 a b", b"\n" * 200_000), r"m\.arpa:16: b'' where a 2-gram was expected"),
        (changed(b"\\2-grams:", b"\n" * 200_000 + b"x" * (9 << 20)), r"m\.arpa:200014: a line of more than 1,048,576 bytes"),
        (b"", r"no \\data\\ .*\(it is empty\)"),
        (b"hello\n" * 5000, r"no \\data\\ in the first 1000 lines.*begins with b'hello'"),
        *(
            (pack(SRILM)[:-20], "cut short")
            for pack in (partial(gzip.compress, mtime=0), lzma.compress, bz2.compress, zstandard.compress)
        ),
        *(
            (pack(SRILM)[:40] + b"damage" + pack(SRILM)[46:], "is cut short or damaged: ")
            for pack in (lzma.compress, bz2.compress, zstandard.compress)
        ),
        (b"PK\x03\x04" + SRILM, r"m\.arpa is compressed by zip, which is not read here\. Unpack it: unzip -p OLD > NEW"),
        (
            gzip.compress(lzma.compress(SRILM), mtime=0),
            r"m\.arpa is compressed by xz, which is not read here\. Unpack it: xz -dc",
        ),
    ],
)
def test_files_that_are_not_whole_are_refused(tmp_path, data, said):
    (tmp_path / "m.arpa").write_bytes(data)
    with pytest.raises(ArpaError, match=said):
        read_arpa(tmp_path / "m.arpa")


def test_a_mark_of_byte_order_is_passed_over(tmp_path):
    (tmp_path / "m.arpa").write_bytes(b"\xef\xbb\xbf" + SRILM.lstrip())
    assert next(load(tmp_path / "m.arpa").score(["a"])).log10 == pytest.approx(-0.3 - 0.05)


@pytest.mark.parametrize(
    ("line", "again", "said"),
    [
        (b"-0.2 a b", b"ngram 2=3", r"m\.arpa:17: the 2-gram `a b` is there twice, first in line 16"),
        (b"-0.05 <s> a </s>", b"ngram 3=2", r"m\.arpa:20: the 3-gram `<s> a </s>` is there twice, first in line 19"),
    ],
)
def test_an_ngram_that_is_there_twice_is_named(tmp_path, line, again, said):
    data = SRILM.replace(line, line + b"\n" + line.replace(b"0.", b"1."), 1)
    (tmp_path / "m.arpa").write_bytes(data.replace(again[:8] + (b"2" if b"2=" in again else b"1"), again))
    with pytest.raises(ArpaError, match=said):
        load(tmp_path / "m.arpa")


def test_lines_are_scored_in_batches(tmp_path, monkeypatch):
    model = load(arpa_of(tmp_path, b"a b c\nb c d\nc d a b\n" * 5))
    asked = [b"a b c", b"", b"d d x", b"c d"] * 50
    whole = list(model.score(asked))
    monkeypatch.setattr("megatrain.ngram.model.BATCH_BYTES", 10)
    assert list(model.score(asked)) == whole
    with pytest.raises(ValueError, match="line break within"):
        list(model.score(["a\nb"]))


@settings(max_examples=60, deadline=None)
@given(
    keys=st.lists(st.integers(0, 2**64 - 2), unique=True, max_size=300), others=st.lists(st.integers(0, 2**64 - 2), max_size=50)
)
def test_tables(keys, others):
    table, slots = Table.of(np.array(keys, np.uint64))
    assert (table.keys != EMPTY).sum() == len(keys) and table.keys[slots].tolist() == keys
    assert table.find(np.array(keys, np.uint64)).tolist() == slots.tolist()
    for other, slot in zip(others, table.find(np.array(others, np.uint64)), strict=True):
        assert (slot == MISSING) == (other not in keys)


def test_a_key_that_is_there_twice_is_refused():
    with pytest.raises(ValueError, match="keys 0 and 2 are the same"):
        Table.of(np.array([5, 7, 5], np.uint64))


@pytest.mark.parametrize(("units", "what"), [("words", "word"), ("characters", "line")])
def test_a_text_that_is_none_is_refused_where_it_goes_wrong(tmp_path, tmp_path_factory, units, what):
    """A word, or a line that units are found in, is in memory whole."""
    with (tmp_path / "text").open("wb") as file:
        file.write(b"a b c\n" * 10)
        file.write(b"x" * (17 << 20))
    with pytest.raises(TextError, match=rf"text: the {what} from byte 60 on has more than 16,777,216 bytes"):
        fit([tmp_path / "text"], tmp_path / "m.arpa", Settings(2, (), FALLBACK, units=units))
    with pytest.raises(TextError, match="text: the line from byte 60 on"):
        list(report(load(arpa_of(tmp_path_factory.mktemp("m"), EXAMPLE, 2)), tmp_path / "text"))
