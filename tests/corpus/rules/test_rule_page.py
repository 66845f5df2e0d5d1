"""docs/rules.md has the rules as they are, and a changed threshold is a visible diff."""

from pathlib import Path

from megatrain.corpus.rules.rule_page import HEAD, page, tables

PAGE = Path(__file__).resolve().parents[3] / "docs" / "rules.md"


def test_the_page_has_the_rules_as_they_are() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count(HEAD) == 1
    assert text == page(text), "run `python -m megatrain.corpus.rules.rule_page docs/rules.md`"


def test_a_row_tells_signal_threshold_words_and_source() -> None:
    rows = tables().splitlines()
    assert (
        "| `gopher.words.most` | words, without those of marks alone | ≤ 100,000 | blanks | Gopher, arXiv:2112.11446, A.1.1 |"
        in rows
    )
    assert "| `c4.line_words` | words of a line | ≥ 3 | blanks | C4, arXiv:1910.10683, section 2.2 |" in rows
