"""Documents judged by rules."""

from megatrain.corpus.document import Document, Tally
from megatrain.corpus.rules.judge import rules_step


def judged(text: str, names: list[str], thresholds: dict[str, float | str | bool] | None = None) -> tuple[list[str], Document]:
    document = Document(text, "source", "file", 0)
    return list(rules_step(names, thresholds or {})(document, Tally())), document


def test_every_rule_that_a_document_breaks_is_named_and_every_signal_is_kept() -> None:
    broken, document = judged("# # #\n" * 40, ["gopher"])
    assert broken == [
        *("gopher.words.least", "gopher.mean_length.least", "gopher.hashes", "gopher.letters", "gopher.stop_words"),
        *("gopher.lines", "gopher.line_letters", "gopher.top_2", "gopher.top_3", "gopher.top_4"),
        *(f"gopher.again_{n}" for n in range(5, 11)),
    ]
    assert document.scores["gopher.words"] == 0
    assert document.scores["gopher.lines"] == 39 / 40
    assert document.scores["gopher.hashes"] == 1


def test_only_the_signals_asked_for_are_found() -> None:
    broken, document = judged("a b c", ["gopher.words.least"])
    assert broken == ["gopher.words.least"]
    assert document.scores == {"gopher.words": 3}


def test_a_threshold_decides() -> None:
    assert judged("a b c", ["gopher.words.least"], {"gopher.words.least": 3})[0] == []
    assert judged("a b c", ["gopher.words"], {"gopher.words": "off"})[0] == []
