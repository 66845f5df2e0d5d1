"""Which examples stand before an item: a function of the seed and of the two texts, whatever the order or number of items asked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from megatrain.evaluation.items import TaskError
from megatrain.evaluation.questions import Question


def shots_for(
    question: Question, candidates: Sequence[Question], count: int, seed: int, *, first: bool = False
) -> tuple[Question, ...]:
    """`count` examples for a question, never the same item or one that asks the same; the last drawn stands next to the question.

    first: the first candidates instead of drawn ones. Raises TaskError where there are not enough.
    """
    if not count:
        return ()
    others = [one for one in candidates if one.item.identity != question.item.identity and one.text != question.text]
    if len(others) < count:
        raise TaskError(
            f"{question.item.file}:{question.item.line}: {count} examples are asked for, and there are {len(others)} other items to show. "
            f"Use --num-fewshot {len(others)}, or give more in fewshot_items."
        )
    if first:
        return tuple(others[:count])
    return tuple(sorted(others, key=lambda one: _draw(seed, question, one))[:count])


def _draw(seed: int, question: Question, candidate: Question) -> bytes:
    """The random number of a candidate for a question."""
    return hashlib.blake2b(f"{seed} {question.item.identity} {candidate.item.identity}".encode(), digest_size=16).digest()
