"""Changed copies: a function of seed and document, marked, and changed as asked for alone."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.corpus.cleaning.augment import augmenting, in_case_of, sentences_of, with_moved_sentences, with_noise
from megatrain.corpus.cleaning.choices import AugmentConfig
from megatrain.corpus.document import Document, Tally
from megatrain.data.draws import Draws

TEXT = "It rained. We stayed in! Was it dull? No.\n\n    code. stays.\n\n天黑了。我们走吧！好。\nA heading"


def copies(text=TEXT, at=0, kind="text", seed=1, tally=None, **keys):
    document = Document(text, "web", "a.jsonl", at, kind, marks={"id": 7})
    return list(augmenting(AugmentConfig(**{"copies": 2, **keys}), seed)(document, tally or Tally()))


def test_copies_follow_their_document_and_say_so():
    tally = Tally()
    first, one, two = copies(tally=tally)
    assert first.text == TEXT and first.marks == {"id": 7}
    assert one.marks == {"id": 7, "augmented": 1} and two.marks == {"id": 7, "augmented": 2}
    assert (one.source, one.file, one.at) == ("web", "a.jsonl", 0)
    assert len({TEXT, one.text, two.text}) == 3
    assert tally.counts == {"augment.copies": 2}


def test_a_function_of_seed_and_document_alone():
    texts = {place: [copy.text for copy in copies(at=place)] for place in range(4)}
    assert {place: [copy.text for copy in copies(at=place)] for place in (3, 1, 0, 2)} == texts
    assert len({tuple(of) for of in texts.values()}) == 4
    assert [copy.text for copy in copies(seed=2)] != texts[0]
    assert [copy.text for copy in copies(copies=1)] == texts[0][:2]  # more copies change no earlier one
    assert texts[0][1] == ("We stayed in! Was it dull? It rained. No.\n\n    code. stays.\n\n我们走吧！天黑了。好。\nA heading")


def test_off_by_default_not_for_code_and_by_source():
    assert len(copies(**{"copies": AugmentConfig().copies})) == 1
    assert len(copies(kind="code")) == 1
    assert len(copies(sources=("other",))) == 1 and len(copies(sources=("web",))) == 3
    tally = Tally()
    assert len(copies("One sentence.", tally=tally)) == 1 and tally.counts == {"augment.unchanged": 2}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["It rained. ", "Was it? ", "天黑了。", "好！", "tail", "\n", "\n\n"]), max_size=12).map("".join),
    st.booleans(),
)
def test_no_sentence_is_lost(text, across):
    moved = with_moved_sentences(text, Draws(3), across=across)
    before, after = ([Counter(sentences_of(line)) for line in of.split("\n")] for of in (text, moved))
    assert len(before) == len(after)
    if not across:
        assert before == after or "tail" in text  # what has no end may be read with its neighbour
    elif "tail" not in text:
        assert sum(before, Counter()) == sum(after, Counter()) and [of.total() for of in before] == [of.total() for of in after]


def test_synonyms(tmp_path):
    path = tmp_path / "groups.txt"
    path.write_text("big, large, huge\n快乐，高兴\nfast\tquick\n", encoding="utf-8")
    keys = {"sentences": "keep", "synonyms": str(path), "copies": 1, "synonym_share": 1.0}
    (_, copy) = copies("A Big dog is fast, BIG and bigger. 他很快乐。<ID>", **keys)
    expected = "A {} dog is quick, {} and bigger. 他很高兴。<ID>"
    assert copy.text in [expected.format(a, b) for a in ("Large", "Huge") for b in ("LARGE", "HUGE")]
    kept = sum(copies("big " * 200, at=at, **keys | {"synonym_share": 0.25})[1].text.split().count("big") for at in range(5))
    assert 0.7 < kept / 1000 < 0.8
    pairs = {("Big", "large"): "Large", ("BIG", "large"): "LARGE", ("big", "large"): "large", ("A", "one"): "One"}
    assert {pair: in_case_of(*pair) for pair in pairs} == pairs
    path.write_text("big")
    with pytest.raises(ValueError, match=r"groups.txt: 'big' has one word alone. Write words that mean the same in a line"):
        copies(**keys)


def test_noise():
    text = "the quick brown fox 1234 <EMAIL> " * 200
    noisy = with_noise(text, 0.1, Draws(5))
    assert noisy.count(" 1234 <EMAIL> ") == 200
    assert with_noise(text, 0.1, Draws(5)) == noisy != with_noise(text, 0.1, Draws(6))
    changed = sum(a != b for a, b in zip(text.split(), noisy.split(), strict=True))
    assert 0.2 < changed / (200 * 4) < 0.4  # a word of four letters is changed with 1 - 0.9^4 = 0.34
    assert with_noise("", 0.5, Draws(1)) == ""
