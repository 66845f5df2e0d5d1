"""Streamed text of a request: no character is split, nothing of a stop string is shown, the cut is where str.find says."""

import codecs
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_models import KINDS

from megatrain.data.tokenizer import ByteTokenizer, JsonTokenizer, bytes_of_letters
from megatrain.inference.text import StopSearch, TextStream

BYTES = ByteTokenizer()
LLAMA = JsonTokenizer(KINDS["llama"]())
GPT2 = JsonTokenizer(KINDS["gpt2"]())
LETTERS = {byte: GPT2.id_of(letter) for letter, byte in bytes_of_letters().items()}
TOKENS = {"bytes": int, "llama": lambda byte: 3 + byte, "gpt2": LETTERS.get}
"""The token of each byte."""
MIXED = st.lists(st.one_of(st.binary(max_size=4), st.text(max_size=3).map(str.encode))).map(b"".join)
"""Characters and loose bytes."""


def streamed(codec, tokens, before=(), stops=()):
    """(the pieces of each token and of the end, the stop string)."""
    stream = TextStream(codec, before, stops)
    pieces = [stream.push(token) for token in tokens]
    return [*pieces, stream.finish()], stream.stopped


def cut(text, stops):
    """The text up to the first stop string, by str.find."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def test_what_is_held_back():
    assert streamed(BYTES, "a你b".encode()) == (["a", "", "", "你", "b", ""], None)
    assert streamed(BYTES, b"a\xffb\xe4\xbdc\xe4") == (["a", "\ufffd", "b", "", "", "\ufffdc", "", "\ufffd"], None)
    assert streamed(BYTES, b"\xf0\x9f\x98\x80\xf0\x9f\x98\xf0\x28") == (
        ["", "", "", "😀", "", "", "", "\ufffd", "\ufffd(", ""],
        None,
    )
    assert streamed(BYTES, b"a b\nc\n\nd", stops=["\n\n"]) == (["a", " ", "b", "", "\nc", "", "", "", ""], "\n\n")
    assert streamed(BYTES, b"ab\n", stops=["\n\n"]) == (["a", "b", "", "\n"], None)


def test_a_stop_string_that_lies_within_an_earlier_one():
    assert streamed(BYTES, b"xabcd", stops=["abcd", "bc"]) == (["x", "", "", "", "", ""], "abcd")
    assert streamed(BYTES, b"xabce", stops=["abcd", "bc"]) == (["x", "", "", "", "a", ""], "bc")
    assert streamed(BYTES, b"xabc", stops=["abcd", "bc"]) == (["x", "", "", "", "a"], "bc")
    assert streamed(BYTES, b"xab", stops=["abc", "ab"]) == (["x", "", "", ""], "ab")


def test_special_tokens_have_no_text_and_begin_a_text_of_its_own():
    end = LLAMA.special_id("</s>")
    once, upon = LLAMA.encode("once upon")
    assert streamed(LLAMA, [upon, end, once], before=[1, once])[0] == [" upon", "", " once", ""]
    assert streamed(LLAMA, [upon, once], before=[once, end])[0] == ["upon", " once", ""]
    assert streamed(BYTES, [97, 256, 98])[0] == ["a", "", "b", ""]
    assert streamed(LLAMA, [5000, once], before=[once])[0] == ["", " once", ""]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="a stop string is empty: every text would end before it begins"):
        TextStream(BYTES, (), ["a", ""])


@settings(max_examples=150, deadline=None)
@given(MIXED, st.sampled_from(["bytes", "llama", "gpt2"]))
def test_any_bytes_give_the_text_of_all_at_once_and_no_character_waits_longer_than_it_must(data, kind):
    codec = {"bytes": BYTES, "llama": LLAMA, "gpt2": GPT2}[kind]
    tokens = [TOKENS[kind](value) for value in data]
    pieces, _ = streamed(codec, tokens)
    first = " " if kind == "llama" else ""  # SentencePiece's decoder takes a blank away where a text begins
    assert "".join(pieces) == codec.decode(tokens) == data.decode(errors="replace").removeprefix(first)
    for number in range(1, len(data) + 1):
        text, waiting = codecs.getincrementaldecoder("utf-8")("replace"), "".join(pieces[:number])
        assert waiting == text.decode(data[:number]).removeprefix(first)


@settings(max_examples=300, deadline=None)
@given(st.text("ab你", max_size=30), st.lists(st.text("ab你", min_size=1, max_size=5), min_size=1, max_size=4))
def test_the_cut_is_where_find_says(text, stops):
    pieces, stopped = streamed(BYTES, text.encode(), stops=stops)
    assert "".join(pieces) == cut(text, stops)
    assert (stopped is None) == (cut(text, stops) == text and not any(stop in text for stop in stops))
    whole = StopSearch(stops)
    assert whole.read(text) + whole.end() == cut(text, stops)
    search, read, shown = StopSearch(stops), "", ""
    for letter in text:
        read, shown = read + letter, shown + search.read(letter)
        if search.found is not None:
            break
        assert any(stop.startswith(read[len(shown) :]) for stop in stops)


def test_long_texts_take_linear_time():
    def seconds(letters):
        stream = TextStream(BYTES, (), ["a" * 5000 + "b"])
        began = time.process_time()
        for number in range(letters):
            assert stream.push(97) == ("" if number < 5000 else "a")
        return time.process_time() - began

    seconds(500)
    assert seconds(20_000) < 12 * seconds(5000)
