"""The rules of a source, and those that `auto` stands for."""

import pytest

from megatrain.corpus.document import Document, Tally
from megatrain.corpus.judging import RulesByKind
from megatrain.corpus.reading.choices import SourceConfig
from megatrain.corpus.rules.rule_choices import FilterConfig


def scores(source: SourceConfig, **what: str) -> set[str]:
    document = Document("A text.", "source", "file", 0, **what)
    RulesByKind(source, FilterConfig())(document, Tally())
    return {name.partition(".")[0] for name in document.scores}


def test_auto_stands_for_the_sets_of_a_kind_and_language() -> None:
    source = SourceConfig(thresholds=(("gopher.words.least", 2.0), ("code.xml", False)))
    assert scores(source, language="en") == {"gopher", "c4", "fineweb"}
    assert scores(source, language="zh") == {"fineweb2_zh"}
    assert scores(source, language="fr") == set()
    assert scores(source, kind="code", language="fr") == {"code"}


@pytest.mark.parametrize(
    ("rules", "expected"), [((), set()), (("gopher",), {"gopher"}), (("auto", "gopher"), {"code", "gopher"})]
)
def test_code_goes_through_the_rules_that_are_named_alone(rules: tuple[str, ...], expected: set[str]) -> None:
    assert scores(SourceConfig(kind="code", rules=rules), kind="code", language="en") == expected


@pytest.mark.parametrize("rules", [("auto",), ("gopher",)])
def test_a_threshold_of_no_rule_is_refused(rules: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"there is no rule 'gopher\.wrods'; the nearest is gopher\.words"):
        RulesByKind(SourceConfig(rules=rules, thresholds=(("gopher.wrods", 2.0),)), FilterConfig())
