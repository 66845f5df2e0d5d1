"""Bits per byte and perplexities: definitions, and an item of each kind of text."""

import math

import pytest

from megatrain.evaluation.likelihood import bits_per_byte, blank_words, nats_per_token, perplexity, utf8_bytes


def test_definitions() -> None:
    nats, tokens, size = [10.0, 30.0], [4, 16], [20, 60]
    assert nats_per_token(nats, tokens).value == 2.0
    assert perplexity(nats, tokens).value == pytest.approx(math.exp(2.0))
    assert bits_per_byte(nats, size).value == pytest.approx(0.5 / math.log(2))
    assert perplexity(nats, size).value == pytest.approx(2 ** bits_per_byte(nats, size).value)
    found, plain = perplexity(nats, tokens), nats_per_token(nats, tokens)
    assert (found.low, found.high) == pytest.approx((math.exp(plain.low), math.exp(plain.high)))
    assert perplexity(nats, tokens, clusters=["one", "one"]).units == 1


def test_a_uniform_guess_of_bytes_has_8_bits() -> None:
    text = "Straße 北京 🙂"
    assert utf8_bytes(text) == 19
    assert bits_per_byte([19 * math.log(256)], [19]).value == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("text", "words", "size"),
    [("a b  c\n", 3, 7), ("", 0, 0), ("北京大学 ok", 5, 15), ("GPT模型", 3, 9), ("\ud800", 1, 3), ("コーヒー", 4, 12)],
)
def test_words_and_bytes(text: str, words: int, size: int) -> None:
    assert (blank_words(text), utf8_bytes(text)) == (words, size)
