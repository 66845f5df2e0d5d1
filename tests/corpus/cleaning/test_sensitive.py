"""Lists of words: what is found, against a plain search, and what is done then."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.corpus.cleaning.choices import CleanConfig, WordsConfig
from megatrain.corpus.cleaning.cleaner import clean_step
from megatrain.corpus.cleaning.sensitive import Sensitive, Trie
from megatrain.corpus.document import Document, Tally

WORDS = ["ass", "Bad Word", "赌博", "赌博网站", "qq群", "é"]


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# a list\n" + "\n".join(WORDS), encoding="utf-8")
    return str(path)


def plain(text, words):
    """Where words are, the longest from the left; whole ones where letters part words by blanks."""
    found, at, folded = [], 0, [w.lower() for w in words]
    small = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)

    def inside(place):
        return 0 < place < len(text) and all(text[p].isalnum() and text[p] < "\u0e00" for p in (place - 1, place))

    while at < len(text):
        ends = [at + len(w) for w in folded if small.startswith(w, at) and not inside(at) and not inside(at + len(w))]
        if ends:
            found.append([at, max(ends)])
        at = max(ends, default=at + 1)
    return found


PIECES = [*WORDS, "bad", " ", "word", "a", "s", "S", "赌", "博", "网站", "1", "É", "İ", "\n", "class", "Qq群"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_found_as_by_a_plain_search(text):
    found, share = Trie(WORDS).find(text)
    assert found.tolist() == plain(text, WORDS)
    black = re.sub(r"\s", "", "".join(text[begin:end] for begin, end in found))
    assert share == len(black) / max(1, len(re.sub(r"\s", "", text)))


def done(words, text, **keys):
    document = Document(text, "web", "a", 0)
    tally = Tally()
    refused = clean_step(CleanConfig(words=WordsConfig(lists=(words,), **keys)))(document, tally)
    return document, tally.counts, refused


TEXT = "一个赌博网站在这里。\n\nThe class has an ASS and a bad word.\n\nA good line."


def test_scores(words):
    document, counts, refused = done(words, TEXT)
    assert document.text == TEXT and refused == ()
    assert document.scores == {"clean.words": 14 / 48}
    assert counts == {"clean.words": 3}


def test_masks(words):
    document, _, _ = done(words, TEXT, action="mask")
    assert document.text == "一个****在这里。\n\nThe class has an *** and a ********.\n\nA good line."
    assert done(words, "赌博", action="mask", mask="某")[0].text == "某某"


def test_removes_lines_and_documents(words):
    document, counts, refused = done(words, TEXT, action="remove", per="line", threshold=0.38)
    assert (
        document.text == "The class has an ASS and a bad word.\n\nA good line."
        and refused == ()
        and counts["clean.words_lines"] == 1
    )
    assert done(words, TEXT, action="remove", threshold=0.25)[2] == ("clean.words",)
    assert done(words, TEXT, action="remove", threshold=0.3)[2] == ()
    assert done(words, "A classical line.", action="remove")[2] == ()


def test_hidden_letters_do_not_hide_words(words):
    assert done(words, "赌\u200b博", action="mask")[0].text == "**"


def test_bad_lists(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("x" * 65)
    with pytest.raises(ValueError, match=r"long.txt: a word has 65 letters, more than 64: 'x{20}'"):
        Sensitive(WordsConfig(lists=(str(path),)))
    path.write_text("# nothing")
    with pytest.raises(ValueError, match=r"long.txt has no words. Write a word or phrase a line"):
        Sensitive(WordsConfig(lists=(str(path),)))


def test_time_is_linear_on_hostile_text():
    trie = Trie(["a" * 64, "赌" * 64 + "博"])
    for text in ("a" * 300_000, "赌" * 300_000, "a " * 150_000):
        trie.find(text)
    assert Counter(map(len, trie.find("a" * 64)[0].tolist())) == {2: 1}
