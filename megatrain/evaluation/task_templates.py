"""The values of a task's keys for an item: the value of a field, or text with {{fields}} in it, which is jinja2 in its sandbox.

value_of("question", fields)                       # a field, of whatever type
value_of("Question: {{question}}", fields)         # text
value_of("{{choices.text}}", fields)               # an expression alone keeps its type: here a list
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from megatrain.extras import need

_USE = "a template with {{ }} (the name of a field needs nothing)"
_FIELD = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_EXPRESSION = re.compile(r"\{\{((?:(?!\{\{|\}\}).)*)\}\}", re.DOTALL)


class TemplateError(ValueError):
    """A template that cannot be filled from an item; it says what is missing."""


def value_of(template: str, fields: Mapping[str, Any]) -> Any:
    """The value of a template for an item. Raises TemplateError; ImportError where jinja2 is needed and not there."""
    if template in fields:
        return fields[template]
    if "{{" in template or "{%" in template:
        return _filled(template, fields)
    if _FIELD.fullmatch(template):
        raise TemplateError(f"there is no field {template!r}. The item has {_listed(fields)}")
    return template


def text_of(template: str, fields: Mapping[str, Any]) -> str:
    """The text of a template for an item, which is a text or a number. Raises TemplateError; ImportError as `value_of`."""
    value = value_of(template, fields)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise TemplateError(f"{template!r} is {_kind(value)}, and must be text")


def _filled(template: str, fields: Mapping[str, Any]) -> Any:
    """The value of a jinja2 template."""
    jinja2 = need("jinja2", _USE, "chat")
    try:
        value = _compiled(template)(fields)
        return value if value is None or isinstance(value, str | int | float | list | tuple) else str(value)
    except jinja2.UndefinedError as error:
        raise TemplateError(f"{error.message}, in {template!r}. The item has {_listed(fields)}") from None
    except Exception as error:  # of jinja2, of the filters' own code (re.error, AssertionError), of memory and depth
        raise TemplateError(f"{template!r} cannot be filled: {type(error).__name__}: {error}") from None


@functools.cache
def _compiled(template: str) -> Callable[[Mapping[str, Any]], Any]:
    """A template as a function of an item's fields."""
    environment = _environment()
    alone = _EXPRESSION.fullmatch(template)
    if alone is not None:
        expression = environment.compile_expression(alone.group(1), undefined_to_none=False)
        return lambda fields: _defined(expression(**fields))
    whole = environment.from_string(template)
    return lambda fields: whole.render(**fields)


def _defined(value: Any) -> Any:
    """A value; one that is undefined raises, as its text is asked for."""
    return str(value) if isinstance(value, need("jinja2", _USE, "chat").Undefined) else value


@functools.cache
def _environment() -> Any:
    """jinja2, sandboxed: a template reaches no attribute that leads out, and a field that is not there is an error."""
    strict, sandbox = need("jinja2", _USE, "chat").StrictUndefined, need("jinja2.sandbox", _USE, "chat")
    environment = sandbox.ImmutableSandboxedEnvironment(undefined=strict, keep_trailing_newline=True)
    environment.filters["regex_replace"] = _regex_replace  # the harness has it
    return environment


def _regex_replace(text: str, pattern: str, by: str = "", count: int = 0) -> str:
    return re.sub(pattern, by, text, count=count)


def _listed(fields: Mapping[str, Any]) -> str:
    """The names of an item's fields."""
    return ", ".join(fields) if fields else "none"


def _kind(value: Any) -> str:
    """A value in words."""
    kinds = {type(None): "null", bool: "true or false", list: "a list", dict: "an object"}
    return kinds.get(type(value), str(value) if isinstance(value, float) else f"a {type(value).__name__}")
