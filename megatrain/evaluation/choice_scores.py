"""Multiple choice: which choice a model picks, from the log-probabilities of the choices' texts, by five rules at once.

| name | picks the largest | source |
|---|---|---|
| acc | sum of log p(choice given question) | lm-evaluation-harness `acc` |
| acc_norm | that / characters of the choice | lm-evaluation-harness `acc_norm` |
| acc_bytes | that / UTF-8 bytes of the choice | the paper's rule (Gao 2021), which differs in Chinese: harness #3278 |
| acc_tokens | that / tokens of the choice | OLMES `acc_per_token` (arXiv:2406.08446) |
| acc_pmi | sum of log p(choice given question) - log p(choice alone) | harness `acc_mutual_info`, OLMES `acc_uncond` |

Equal scores are broken by the first choice, as numpy's argmax does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatrain.evaluation.intervals import Floats


@dataclass(frozen=True)
class ChoiceSums:
    """The choices of one question as a model sees them, one number for each."""

    sums: Sequence[float]
    """Log-probabilities of the choice's tokens after the question, in nats."""
    tokens: Sequence[int]
    characters: Sequence[int]
    """Length of the choice's text, without the blank that joins it to the question."""
    utf8_bytes: Sequence[int]
    alone: Sequence[float] | None = None
    """Sums without the question; None where they were not asked for."""


def choice_picks(question: ChoiceSums) -> dict[str, int]:
    """The picked choice by each rule, acc_pmi only where `alone` is given.

    A choice without characters, bytes or tokens counts as of one. A sum may be -inf, nan not. Raises ValueError for no choices, lists of
    several lengths and nan.
    """
    lists = [question.sums, question.tokens, question.characters, question.utf8_bytes]
    lists += [] if question.alone is None else [question.alone]
    rows = [np.asarray(numbers, dtype=np.float64) for numbers in lists]
    lengths = [len(row) for row in rows]
    if not lengths[0] or len(set(lengths)) > 1 or any(np.isnan(row).any() for row in rows):
        raise ValueError(
            f"lists of {lengths} numbers (sums, tokens, characters, bytes, alone) are no choices of one question. Give at least one "
            "choice and as many numbers in each list, none of them nan."
        )
    sums, tokens, characters, utf8_bytes, *alone = rows
    scores = {
        "acc": sums,
        "acc_norm": sums / np.maximum(characters, 1.0),
        "acc_bytes": sums / np.maximum(utf8_bytes, 1.0),
        "acc_tokens": sums / np.maximum(tokens, 1.0),
    }
    if alone:
        scores["acc_pmi"] = _gain(sums, alone[0])
    return {name: int(np.argmax(score)) for name, score in scores.items()}


def _gain(sums: Floats, alone: Floats) -> Floats:
    """sums - alone; a choice that is impossible after the question stays so, though it were impossible alone, too."""
    impossible = np.isneginf(sums)
    return np.where(impossible, -np.inf, np.where(impossible, 0.0, sums) - alone)


def choice_accuracy(questions: Sequence[ChoiceSums], right: Sequence[int]) -> dict[str, list[bool]]:
    """Whether each question's pick is the right choice, by each rule that all questions have; `right` counts choices from 0.

    Raises ValueError for a right choice that a question does not have.
    """
    for at, (question, choice) in enumerate(zip(questions, right, strict=True)):
        if not 0 <= choice < len(question.sums):
            raise ValueError(f"question {at} has choices 0 to {len(question.sums) - 1}; its right one cannot be {choice}.")
    picks = [choice_picks(question) for question in questions]
    names = [name for name in picks[0] if all(name in picked for picked in picks)] if picks else []
    return {name: [picked[name] == choice for picked, choice in zip(picks, right, strict=True)] for name in names}
