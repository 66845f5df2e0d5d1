"""Text that appears token by token: what stands before decides how a token looks, characters are never split, nothing is lost."""

import pytest
from tokenizer_models import KINDS

from megatrain.data.stream import CONTEXT, GrowingText
from megatrain.data.tokenizer import ByteTokenizer, JsonTokenizer

CODECS = {"bytes": ByteTokenizer, **{kind: lambda made=made: JsonTokenizer(made()) for kind, made in KINDS.items()}}
LLAMA = JsonTokenizer(KINDS["llama"]())
NI = [3 + byte for byte in "你".encode()]
"""The bytes of a character, as tokens of the LLaMA-like tokenizer."""


def pieces_of_text(codec, ids, before=()):
    """The text that ids add to that of others, piece by piece."""
    text = GrowingText(codec, before)
    return [piece for piece in (*map(text.push, ids), text.finish()) if piece]


def split(codec, text, at):
    """The ids of a text, and the pieces in which those from `at` on appear."""
    ids = codec.encode(text)
    return ids[:at], pieces_of_text(codec, ids[at:], ids[:at])


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_blanks_between_prompt_and_answer_stay(kind):
    assert split(CODECS[kind](), "once upon a time", 1)[1] == [" upon", " a", " time"]
    assert split(CODECS[kind](), "once upon a time", 0)[1] == ["once", " upon", " a", " time"]
    assert split(CODECS[kind](), "once 你😀 a", 1)[1] == [" ", "你", "😀", " a"]


def test_other_kinds():
    assert split(CODECS["bert"](), "The cats. Once", 1)[1] == [" cat", "s", ".", " once"]
    assert split(CODECS["bytes"](), "aé€b", 0)[1] == ["a", "é", "€", "b"]
    assert split(CODECS["bytes"](), "ab", 1)[1] == ["b"]
    assert split(CODECS["gpt2"](), "once 你 a", 1)[1] == [" ", "你", " a"]


@pytest.mark.parametrize("kind", CODECS)
def test_the_pieces_are_the_text_wherever_the_prompt_ends(kind):
    codec = CODECS[kind]()
    text = "the cat" if kind == "bert" else "the cat, 你好 😀🙂!\n  a  time"
    whole = codec.encode(text)
    for at in range(len(whole) + 1):
        before, pieces = split(codec, text, at)
        assert all("\ufffd" not in piece for piece in pieces[1:])
        if "\ufffd" not in codec.decode(before):
            assert codec.decode(before) + "".join(pieces) == codec.decode(whole) == text


@pytest.mark.parametrize("kind", CODECS)
def test_a_long_text_is_that_of_all_tokens_at_once(kind):
    codec = CODECS[kind]()
    ids = codec.encode("once upon a time the cat " * 20 if kind == "bert" else "once 你😀 upon a  time\n " * 20)
    assert len(ids) > 3 * CONTEXT
    assert "".join(pieces_of_text(codec, ids)) == codec.decode(ids)


def test_bytes_that_are_no_character_are_shown_once_and_cost_nothing_else():
    a = LLAMA.encode("a")
    assert list(pieces_of_text(LLAMA, NI + NI[:2], a)) == ["你", "\ufffd"]
    assert list(pieces_of_text(LLAMA, [*NI, *NI[:1], *a], a)) == ["你", "\ufffd a"]
    assert LLAMA.decode([*a, *NI, *NI[:2]]) == "a你\ufffd"
    assert list(pieces_of_text(ByteTokenizer(), b"a\xc3")) == ["a", "\ufffd"]
    assert list(pieces_of_text(ByteTokenizer(), b"a\xffb\xc3")) == ["a", "\ufffd", "b", "\ufffd"]
    assert list(pieces_of_text(ByteTokenizer(), [])) == []


def test_a_character_that_was_begun_before_is_shown_whole():
    assert list(pieces_of_text(LLAMA, NI[2:], [*LLAMA.encode("a"), *NI[:2]])) == ["你"]


def test_ids_beyond_the_tokenizer_show_as_nothing():
    assert ByteTokenizer().decode([97, 300, 98]) == "ab"
    assert LLAMA.decode([*LLAMA.encode("a"), 5000]) == "a"


def test_a_decoder_that_changes_what_it_showed_loses_nothing():
    class Contrary:
        """Three tokens are a word of another spelling than two."""

        def decode(self, ids):
            return ["", "do", "do not", "don't", "don't go"][len(ids)]

        def unfinished(self, ids):
            return 0

    assert "".join(pieces_of_text(Contrary(), [0, 0, 0, 0])) == "do notn't go"
