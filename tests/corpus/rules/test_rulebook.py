"""The table of rules, and how rules are chosen from it."""

from dataclasses import replace

import pytest

from megatrain.corpus.rules.rulebook import RULES, Bound, chosen


def test_a_signal_with_two_bounds_has_two_rules_and_one_score() -> None:
    least, most = chosen(["gopher.words"], {})
    assert (least.name, least.bound, least.threshold, least.score) == ("gopher.words.least", "least", 50, "gopher.words")
    assert (most.name, most.bound, most.threshold, most.score) == ("gopher.words.most", "most", 100_000, "gopher.words")


@pytest.mark.parametrize(
    ("bound", "below", "at", "over"),
    [("least", False, True, True), ("above", False, False, True), ("most", True, True, False), ("below", True, False, False)],
)
def test_what_a_bound_says_of_values_around_the_threshold(bound: Bound, below: bool, at: bool, over: bool) -> None:
    rule = replace(RULES["gopher.letters"], bound=bound)
    assert [rule.holds(value) for value in (0.7, 0.8, 0.9)] == [below, at, over]


def test_thresholds_replace_those_of_the_source_and_switch_rules_off() -> None:
    found = chosen(["gopher"], {"gopher.words.least": 20, "gopher.words.most": "off", "gopher.top_2": False})
    names = {rule.name: rule.threshold for rule in found}
    assert len(names) == len([name for name in RULES if name.startswith("gopher.")]) - 2
    assert names["gopher.words.least"] == 20
    assert names.keys() & {"gopher.words.most", "gopher.top_2"} == set()


def test_a_word_table_replaces_that_of_the_source() -> None:
    assert {rule.words for rule in chosen(["gopher"], {}, "marks")} == {"marks"}
    assert {rule.words for rule in chosen(["gopher"], {})} == {"blanks"}


@pytest.mark.parametrize(
    ("names", "thresholds", "message"),
    [
        (
            ["gopher.mean_lenght"],
            {},
            "there is no rule 'gopher.mean_lenght'; the nearest is gopher.mean_length (docs/rules.md has all)",
        ),
        (["gofer"], {}, "there is no rule 'gofer'; the nearest is gopher (docs/rules.md has all)"),
        (
            ["gopher"],
            {"gopher.wrods": 3},
            "there is no rule 'gopher.wrods'; the nearest is gopher.words (docs/rules.md has all)",
        ),
        (["gopher"], {"gopher.top_2": "some"}, "the threshold of the rule gopher.top_2 is 'some': must be a number, or off"),
        (["gopher"], {"gopher.top_2": True}, "the threshold of the rule gopher.top_2 is True: must be a number, or off"),
        (
            ["gopher"],
            {"gopher.words": 3},
            "gopher.words names 2 rules, which one number cannot serve: say gopher.words: off, or name one: gopher.words.least",
        ),
        (
            ["gopher.top_2"],
            {"gopher.top_3": 0.5},
            "there is a threshold for the rule gopher.top_3, which is not asked for: add it to the rules",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(names: list[str], thresholds: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError) as error:
        chosen(names, thresholds)
    assert str(error.value) == message


def test_a_rule_of_words_that_jieba_finds_is_in_its_set_with_jieba_alone() -> None:
    assert "map_neo.mean_length.least" not in [rule.name for rule in chosen(["map_neo"], {}, "han")]
    assert {rule.words for rule in chosen(["map_neo"], {}, "jieba")} == {"jieba"}
    assert [rule.words for rule in chosen(["map_neo.mean_length"], {}, "han")] == ["jieba", "jieba"]
    assert chosen(["map_neo.mean_length"], {"map_neo": "off"}) == []
