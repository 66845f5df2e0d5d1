"""The tables of docs/rules.md, made from the rules: `python -m megatrain.corpus.rules.rule_page docs/rules.md` writes them anew.

A test compares the page with `page()`, so that it cannot fall behind the code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from megatrain.corpus.rules.rulebook import RULES, TextRule

HEAD = "<!-- What follows is made by `python -m megatrain.corpus.rules.rule_page docs/rules.md` from corpus/rules/rulebook.py. -->\n"
WORD_MEASURES = {"quality", "grams", "stop_words_en", "stop_words_zh"}
"""Measures all of whose signals depend on the table of words."""
WORD_SIGNALS = {"fineweb.feeds", "roots.words_5", "line.line_words"}
"""Signals of other measures that depend on the table of words."""
SIGNS = {"least": "≥", "most": "≤", "above": ">", "below": "<"}


def _number(value: float) -> str:
    return f"{value:,.10g}"


def _rows(rules: list[TextRule]) -> Iterator[str]:
    for rule in rules:
        words = rule.words if rule.signal.partition(".")[0] in WORD_MEASURES or rule.signal in WORD_SIGNALS else ""
        bound = f"{SIGNS[rule.bound]} {_number(rule.threshold)}"
        yield f"| `{rule.name}` | {rule.says} | {bound} | {words} | {rule.source} |\n"


def tables() -> str:
    """A table for each set."""
    parts = [HEAD]
    for of in dict.fromkeys(rule.of for rule in RULES.values()):
        parts.append(f"\n### {of}\n\n| rule | signal | kept where | words | source |\n| --- | --- | --- | --- | --- |\n")
        parts += _rows([rule for rule in RULES.values() if rule.of == of])
    return "".join(parts)


def page(text: str) -> str:
    """A page with its tables made anew: all that follows HEAD."""
    return text.partition(HEAD)[0] + tables()


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
