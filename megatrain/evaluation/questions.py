"""Items as a task asks them: text, choices and right answers, checked before any model is asked."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatrain.evaluation.items import Item
from megatrain.evaluation.task_keys import TaskKeys
from megatrain.evaluation.task_templates import TemplateError, text_of, value_of

BLANK = re.compile("_{3,}")
"""The blank of a cloze that has choices."""
MASK = re.compile(r"\[[gs]?MASK\]")
"""The blanks of a GLM."""
_NO_BLANK_BEFORE = re.compile("[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U000323af]")
"""Han, kana, and the marks between them: before them stands no blank."""
_DIGITS = 20
"""A place among choices has fewer; thousands of them are an error of Python's own."""


@dataclass(frozen=True)
class Question:
    """An item as it is asked."""

    item: Item
    text: str
    """The text that is asked, without examples; of a cloze with choices, the text before the blank."""
    choices: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    """Places of the right answers among the choices."""
    targets: tuple[str, ...] = ()
    """Right answers as text; of a document its text."""
    after: str = ""
    """Text behind the blank of a cloze that has choices."""
    cluster: str = ""
    """Items of one cluster have this in common."""


def questions_of(keys: TaskKeys, items: Sequence[Item]) -> tuple[Question, ...]:
    """The items of a task as they are asked. Raises TaskError that names the item's file and line; ImportError where jinja2 is needed."""
    return tuple(question_of(keys, item) for item in items)


def question_of(keys: TaskKeys, item: Item) -> Question:
    """An item as it is asked. Raises TaskError."""
    try:
        return _question(keys, item)
    except TemplateError as error:
        item.refuse(f"{error}.")


def _question(keys: TaskKeys, item: Item) -> Question:
    fields = item.fields
    if keys.doc_to_decontamination_query is not None:
        text_of(keys.doc_to_decontamination_query, fields)  # it is asked for when all is done, and is wrong now
    cluster = "" if keys.cluster is None else str(value_of(keys.cluster, fields))
    text = text_of(keys.doc_to_text, fields) if keys.doc_to_text else ""
    target = _target(keys, item)
    if keys.doc_to_choice is not None:
        choices = _choices(keys, item)
        right = tuple(_place(item, one, choices) for one in (target if isinstance(target, list | tuple) else [target]))
        if not right:
            item.refuse("doc_to_target is an empty list. Give at least one right answer.")
        before, after = _around_blank(keys, item, text)
        return Question(item, before, choices, right, tuple(choices[place] for place in right), after, cluster)
    targets = _texts(item, target)
    if keys.output_type == "infilling" and len(MASK.findall(text)) != 1:
        item.refuse(
            f"doc_to_text has {len(MASK.findall(text))} blanks, and infilling fills one. Write one [MASK], [sMASK] or [gMASK]."
        )
    return Question(item, text, targets=targets, cluster=cluster)


def _target(keys: TaskKeys, item: Item) -> Any:
    """The value of doc_to_target."""
    given = keys.doc_to_target
    return value_of(given, item.fields) if isinstance(given, str) else given


def _texts(item: Item, target: Any) -> tuple[str, ...]:
    """Right answers as text."""
    found = [str(one) if _is_number(one) else one for one in (target if isinstance(target, list | tuple) else [target])]
    if not found or not all(isinstance(one, str) and one for one in found):
        item.refuse(f"doc_to_target is {_shown(target)}. Give a text that is not empty, or a list of such texts.")
    return tuple(found)


def _choices(keys: TaskKeys, item: Item) -> tuple[str, ...]:
    """The choices."""
    given = keys.doc_to_choice
    found = value_of(given, item.fields) if isinstance(given, str) else [_literal(one, item) for one in given or ()]
    if not isinstance(found, list | tuple) or len(found) < 2:
        item.refuse(f"doc_to_choice is {_shown(found)}. Give a list of two choices or more.")
    choices = tuple(str(one) if not isinstance(one, bool) and _is_number(one) else one for one in found)
    for number, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            item.refuse(f"choice {number} is {_shown(choice)}. Give each choice a text that is not empty.")
    if len(set(choices)) < len(choices):
        twice = next(choice for choice in choices if choices.count(choice) > 1)
        item.refuse(f"the choice {twice!r} is given twice. Give each choice once.")
    return choices


def _is_number(value: Any) -> bool:
    """Whether a value is a number that is there: a field that lacks one is often NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def _literal(text: str, item: Item) -> str:
    """An entry of a list of choices: itself, unless it has fields in it."""
    return text_of(text, item.fields) if "{{" in text or "{%" in text else text


def _place(item: Item, target: Any, choices: Sequence[str]) -> int:
    """The place of a right answer among the choices, given as that place or as its text."""
    if isinstance(target, str) and target in choices:
        return choices.index(target)
    number = int(target) if isinstance(target, str) and target.isdecimal() and len(target) < _DIGITS else target
    if isinstance(number, int) and 0 <= number < len(choices):
        return int(number)
    item.refuse(
        f"doc_to_target is {_shown(target)}, which is none of the {len(choices)} choices {_shown(list(choices))}. "
        f"Give the text of one, or its place, 0 to {len(choices) - 1}."
    )


def _around_blank(keys: TaskKeys, item: Item, text: str) -> tuple[str, str]:
    """The texts before and behind the blank of a cloze; of other kinds all and nothing."""
    if keys.output_type not in ("cloze", "loglikelihood"):
        return text, ""
    parts = BLANK.split(text)
    if len(parts) != 2:
        item.refuse(
            f"doc_to_text has {len(parts) - 1} blanks, and a cloze with choices has one. Write one ___ where the choices go."
        )
    return parts[0], parts[1]


def delimiter(keys: TaskKeys, answer: str) -> str:
    """The text between what is asked and an answer."""
    if keys.target_delimiter is not None:
        return keys.target_delimiter
    return "" if _NO_BLANK_BEFORE.match(answer) else " "


def _shown(value: Any) -> str:
    """A value for messages."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
