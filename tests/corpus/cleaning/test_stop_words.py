"""Stop words: whole words of English, words of Chinese as jieba parts them."""

from collections import Counter

from megatrain.corpus.cleaning.choices import CleanConfig
from megatrain.corpus.cleaning.cleaner import clean_step
from megatrain.corpus.cleaning.stop_words import StopWords
from megatrain.corpus.document import Document, Tally


def test_words_are_removed_as_a_whole(tmp_path):
    path = tmp_path / "stop.txt"
    path.write_text("# English\nthe\nof\nDon't\nit\n的\n是\n", encoding="utf-8")
    counts = Counter()
    text = "The theory of it,\nsitting on the\ndon't itself. 我们的目的是好的。"
    assert (
        StopWords(str(path)).without(text, counts) == "theory ,\nsitting on\nitself. 我们目的好。"
    )  # 目的 has no stop word in it
    assert counts == {"stop_words": 8}


def test_off_by_default_and_never_for_code(tmp_path):
    path = tmp_path / "stop.txt"
    path.write_text("the")
    for settings, kind, text in ((CleanConfig(), "text", "the end"), (CleanConfig(stop_words=str(path)), "code", "the end")):
        document = Document(text, "web", "a", 0, kind)
        clean_step(settings)(document, Tally())
        assert document.text == "the end"
    document = Document("the end", "web", "a", 0)
    clean_step(CleanConfig(stop_words=str(path)))(document, Tally())
    assert document.text == "end"
