import sys

import pytest

from megatrain.evaluation.task_templates import TemplateError, text_of, value_of
from megatrain.extras import MissingPackageError

FIELDS = {"question": "Why?", "choices": {"text": ["a", "b"]}, "answer": 1, "n": 2.5, "none": None, "missing": float("nan")}


@pytest.mark.parametrize(
    ("template", "value"),
    [
        ("question", "Why?"),
        ("answer", 1),
        ("{{choices.text}}", ["a", "b"]),
        ("{{answer + 1}}", 2),
        ("Q: {{question}}\n", "Q: Why?\n"),
        ("{{question}}{{answer}}", "Why?1"),
        ("{% if answer %}yes{% endif %}", "yes"),
        ("{{question|regex_replace('W', 'w')}}", "why?"),
        ("Say it.", "Say it."),
        ("中文", "中文"),
    ],
)
def test_fields_expressions_and_text(template, value):
    assert value_of(template, FIELDS) == value


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("questoin", "there is no field 'questoin'. The item has question, choices, answer, n, none, missing"),
        ("Q: {{questoin}}", "'questoin' is undefined, in 'Q: {{questoin}}'. The item has question"),
        ("{{questoin}}", "'questoin' is undefined, in '{{questoin}}'."),
        ("{{question", "cannot be filled: TemplateSyntaxError"),
        ("{{question.__class__.__mro__}}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{answer / 0}}", "cannot be filled: ZeroDivisionError"),
        ("none", "'none' is null, and must be text"),
        ("{{choices.text}}", "'{{choices.text}}' is a list, and must be text"),
        ("{{question|regex_replace('(', '')}}", "cannot be filled: error: missing ), unterminated subpattern"),
        ("{{question|truncate(-5)}}", "cannot be filled: AssertionError"),
        ("{% macro f() %}{{f()}}{% endmacro %}{{f()}}", "cannot be filled: RecursionError"),
        ("{{'a' * 10 ** 17}}", "cannot be filled: MemoryError"),
        ("missing", "'missing' is nan, and must be text"),
    ],
)
def test_what_is_missing(template, message):
    with pytest.raises(TemplateError) as caught:
        text_of(template, FIELDS)
    assert message in str(caught.value)
    assert (text_of("answer", FIELDS), text_of("n", FIELDS)) == ("1", "2.5")


def test_a_field_needs_no_jinja2(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert value_of("question", FIELDS) == "Why?"
    with pytest.raises(MissingPackageError, match=r"a template with .* needs jinja2: pip install 'megatrain\[chat\]'"):
        value_of("{{question}}", FIELDS)
