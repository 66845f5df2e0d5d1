import math

import pytest
from tokenizer_models import bilingual

from megatrain.data.tokenizer import JsonTokenizer, load_tokenizer
from megatrain.evaluation.prepared import LeftToRightTexts
from megatrain.inference.requests import Request

BYTES = load_tokenizer("bytes")


def test_pairs_prompts_and_documents():
    texts = LeftToRightTexts(BYTES, 8)
    short, long, empty = texts.pairs([("ab", " c"), ("abcdefgh", " xy"), ("", "c")])
    assert [(one.windows[0].tokens, one.windows[0].first) for one in (short, empty)] == [
        (tuple(b"ab c"), 2),
        ((256, *b"c"), 1),
    ]
    assert (short.tokens, short.cut, short.spanned) == (2, False, False)
    assert (long.windows[0].tokens, long.windows[0].first, long.cut) == (
        tuple(b"cdefgh xy"),
        6,
        True,
    )  # 8 read, one more scored
    assert [texts.prompt(text, 3).tokens for text in ("ab", "abcdefgh", "")] == [tuple(b"ab"), tuple(b"defgh"), (256,)]
    assert [texts.prompt(text, 3).cut for text in ("ab", "abcdefgh")] == [False, True]
    document = texts.document("0123456789abcdefghij")
    assert [(bytes(one.tokens[one.tokens[0] == 256 :]), one.first) for one in document.windows] == [
        (b"01234567", 1),
        (b"789abcdef", 1),
        (b"bcdefghij", 5),
    ]
    assert (document.tokens, document.cut, texts.document("ab").cut) == (20, True, False)


def test_what_opens_a_text_is_put_once():
    library = bilingual(True)
    codec = JsonTokenizer(library)
    texts = LeftToRightTexts(codec, 64)
    (pair,) = texts.pairs([("Paris", " is")])
    start = codec.beginning.opening
    assert len(start) == 1 and pair.windows[0].tokens[:1] == start
    for tokens in (pair.windows[0].tokens, texts.prompt("Paris", 4).tokens, texts.document("Paris").windows[0].tokens):
        assert tokens.count(start[0]) == 1


def test_scores_of_windows_are_those_of_the_whole(gpt):
    """Each token of a document is scored once, in the order of the text: the sum of all windows is that of the tokens one by one."""
    texts = LeftToRightTexts(gpt.codec, 16)
    document = texts.document("The quick brown fox jumps over.")
    answers = gpt.engine.run([Request(one.tokens, 0, score_from=one.first) for one in document.windows])
    scored = bytes(of.token for answer in answers for of in answer.prompt)
    assert scored == b"The quick brown fox jumps over."
    one_by_one = 0.0
    for window in document.windows:
        places = range(window.first, len(window.tokens))
        alone = gpt.engine.run([Request(window.tokens[: place + 1], 0, score_from=place) for place in places])
        one_by_one += sum(answer.prompt[0].logprob for answer in alone)
    assert math.fsum(of.logprob for answer in answers for of in answer.prompt) == pytest.approx(one_by_one, abs=1e-4)
