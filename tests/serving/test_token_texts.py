"""Texts, bytes and places of single tokens, for tokenizers of bytes, of GPT-2's kind and of SentencePiece's."""

import pytest
from tokenizer_models import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatrain.data.tokenizer import ByteTokenizer, JsonTokenizer
from megatrain.serving.token_texts import Offsets, TokenTexts, bytes_of_name


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: place for place, letter in enumerate(alphabet)} | {"Ġa": len(alphabet)}
    library = Tokenizer(models.BPE(vocab, [("Ġ", "a")]))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return JsonTokenizer(library)


@pytest.mark.parametrize(
    "codec", [ByteTokenizer(), byte_level(), JsonTokenizer(sentencepiece())], ids=["bytes", "gpt-2", "sentencepiece"]
)
def test_the_bytes_of_tokens_are_those_of_the_text(codec):
    texts, text = TokenTexts(codec), "once a 你好 \U0001f642é"
    ids = codec.encode(text)
    raw = b"".join(texts.of(token)[1] for token in ids)
    assert raw.decode().lstrip() == text
    for token in ids:
        shown, own = texts.of(token)
        assert shown == (own.decode() if own.isascii() or not shown.startswith("bytes:") else shown)


def test_a_part_of_a_character_is_shown_as_bytes():
    texts = TokenTexts(ByteTokenizer())
    assert texts.of(0xE4) == ("bytes:\\xe4", b"\xe4")
    assert texts.of(ord("a")) == ("a", b"a")
    assert texts.of(256) == ("<|endoftext|>", b"<|endoftext|>")
    assert texts.of(260)[1] == b""  # an id without a text


def test_a_blank_before_a_word_stays():
    codec = JsonTokenizer(sentencepiece())
    texts = TokenTexts(codec)
    (once,) = codec.encode("once")
    assert texts.name(once) == " once"


def test_names_of_bytes():
    assert bytes_of_name("<0xE4>") == b"\xe4"
    assert bytes_of_name("Ġa") == b" a" and bytes_of_name("ä½ł") == "你".encode()
    assert bytes_of_name("▁a") is None and bytes_of_name("你") is None


def test_places_count_characters():
    assert Offsets().of([b"a", b"\xe4", b"\xbd", b"\xa0", b"b"]) == [0, 1, 1, 1, 2]
    assert Offsets(5).of([b"\xe4", b"b"]) == [5, 6]  # no whole character: shown as one
