"""Rules that take lines away: C4's."""

from collections.abc import Mapping

import numpy as np
import pytest
import reference_rules as reference
from hypothesis import given, settings
from rule_texts import texts

from megatrain.corpus.rules.line_signals import BOUNDS, Edited, LineEditor, _take, pieces
from megatrain.corpus.rules.repetition import Repeats
from megatrain.corpus.rules.rulebook import chosen
from megatrain.corpus.rules.view import View


def edited(text: str, thresholds: Mapping[str, float | str | bool] | None = None) -> Edited:
    return LineEditor(chosen(["c4"], thresholds or {}))(text)


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("A good line stays here.", ""),
        ('He said "well, why not?"', ""),
        ("No mark at the end", "c4.line_end"),
        ("It goes on and on...", "c4.line_end"),
        ("Two words.", "c4.line_words"),
        ("Please switch on JavaScript to go on.", "c4.javascript"),
        ("We have a Privacy Policy for that.", "c4.policy"),
        (f"One word is {'x' * 1001} too long.", "c4.long_word"),
        (f"One word is {'x' * 1000} not.", ""),
        ("", "c4.line_end"),
    ],
)
def test_a_line_goes_with_the_first_rule_that_it_breaks(line: str, rule: str) -> None:
    found = edited(f"Before it stood this.\n  {line} \r\nAfter it stood that.")
    assert found.text == "\n".join(["Before it stood this.", *([] if rule else [line]), "After it stood that."])
    assert found.removed == ({rule: 1} if rule else {})
    assert found.signals[rule.partition(".")[2] or "line_end"] == (1 / 3 if rule else 0)


def test_marks_of_citations_go_and_their_lines_stay() -> None:
    found = edited("It is so.[12] And so[citation needed] on. [edit]\nIt is [a] list[].")
    assert found.text == "It is so. And so on.\nIt is [a] list."
    assert found.removed == {"c4.citations": 4}


def test_what_the_lines_left_say_of_the_document() -> None:
    found = edited('Lorem Ipsum is here. "Is it?" Yes! And 3.5 of it.\nno { end\nA { b } { c.\nJavascript { lorem ipsum is on.')
    assert {name: found.signals[name] for name in ("lorem_ipsum", "curly_bracket", "sentences")} == {
        "lorem_ipsum": 2,  # javascript has its turn later
        "curly_bracket": 2,
        "sentences": 4 + 1,
    }


def test_a_rule_of_lines_that_is_off_takes_none() -> None:
    assert edited("No mark at the end", {"c4.line_end": "off"}).text == "No mark at the end"
    assert edited("Two words.", {"c4.line_words": 2}).text == "Two words."


def test_without_rules_of_lines_the_text_stays_as_it_is() -> None:
    found = LineEditor(chosen(["c4.sentences"], {}))("  One. Two.\r\n\r\n three ")
    assert found.text == "  One. Two.\r\n\r\n three "
    assert found.signals["sentences"] == 3


def test_pieces_are_whole_lines() -> None:
    assert list(pieces("ab\ncd\r\nefghijklm\nn\no", 4)) == ["ab\n", "cd\r\n", "efghijklm\n", "n\no"]
    assert list(pieces("", 4)) == []
    text = "".join(np.random.default_rng(3).choice(list("ab\n\r\u2028"), 1000))
    for size in (1, 2, 3, 10):
        parts = list(pieces(text, size))
        assert [line for part in parts for line in part.splitlines(keepends=True)] == text.splitlines(keepends=True)
        assert all(len(part) <= size or len(part.splitlines()) == 1 for part in parts)


def test_of_a_very_long_line_the_beginning_and_the_end_are_looked_at() -> None:
    text = "A word. " * 300_000
    found = edited(f"Before it stood this.\n {text}\n{text}x\nAfter it stood that.")
    assert found.text == f"Before it stood this.\n{text.strip()}\nAfter it stood that."
    assert found.removed == {"c4.line_end": 1}
    assert edited("x" * 3_000_000 + ".").removed == {"c4.long_word": 1}


@settings(max_examples=100, deadline=None)
@given(texts)
def test_the_lines_that_stay_are_those_written_plainly(text: str) -> None:
    for off in (False, True):
        found = edited(text, {"c4.line_end": "off"} if off else {})
        left, numbers = reference.c4(text, keep_unended=off)
        assert found.text == left
        assert {name: found.signals[name] for name in numbers} == numbers


@pytest.mark.parametrize(("bound", "left"), [("least", [2, 3]), ("most", [1, 2]), ("above", [3]), ("below", [1])])
def test_lines_that_do_not_meet_a_bound_are_taken_once(bound, left):
    values, alive = np.array([1, 2, 3, 2]), np.array([True, True, True, False])
    assert _take(values, BOUNDS.index(bound), 2.0, alive) == 3 - len(left)
    assert values[alive].tolist() == left


@pytest.mark.parametrize("text", ["One. \nTwo words [1] here.\n", "No mark\n{ lorem ipsum }\nIt uses cookies."])
def test_what_was_found_of_the_text_before_changes_nothing(text):
    editor = LineEditor(chosen(["c4"], {}))
    assert editor(text, View(text, Repeats())) == editor(text, View("another text", Repeats())) == editor(text)
