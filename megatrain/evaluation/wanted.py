"""The questions that each kind of task puts to a model for an item, and what it makes of the answers: pure functions, item by item.

multiple choice     log-probability of each choice after the context, and without it (PMI)
classification      the same of each label word, or a text
cloze               log-probability of the right answer, and whether each of its tokens is the most probable; or of each choice in its place
infilling           the same of a blank's text, and a text
generation          a text
rolling             log-probability of a whole document
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatrain.evaluation.choice_scores import ChoiceSums, choice_picks
from megatrain.evaluation.likelihood import blank_words, utf8_bytes
from megatrain.evaluation.prompts import Manner, answer_of
from megatrain.evaluation.questions import Question
from megatrain.evaluation.scoring import Likelihood
from megatrain.evaluation.tasks import EvalTask
from megatrain.evaluation.text_scores import exact_match, token_f1


@dataclass(frozen=True)
class Wanted:
    """The texts whose log-probabilities or continuations a question wants to know."""

    pairs: tuple[tuple[str, str], ...] = ()
    """(context, answer): log-probabilities."""
    prompt: str | None = None
    """A context that is continued."""
    document: str | None = None
    """A text that is scored whole."""


@dataclass(frozen=True)
class Written:
    """A text that the model has written."""

    text: str
    finish: str
    """`stop` or `length`."""
    tokens: int


@dataclass(frozen=True)
class Outcome:
    """The result of a question."""

    values: dict[str, float]
    """Numbers that metrics are made of."""
    record: dict[str, Any]
    """Parts that a person wants to see."""
    label: str = ""
    """The right class of a classification."""
    predicted: str | None = None
    """The class that the model says; None if none."""


def wanted(task: EvalTask, question: Question, context: str, manner: Manner) -> Wanted:
    """The texts that a question puts to the model."""
    keys = task.keys
    kind = keys.output_type
    if kind == "loglikelihood_rolling":
        return Wanted(document=question.targets[0])
    if kind == "generate_until" or (kind == "classification" and keys.answered_by == "generation"):
        return Wanted(prompt=context)
    answers = question.choices or question.targets[:1]
    pairs = tuple((context, answer_of(keys, question, answer, manner.chat)) for answer in answers)
    if kind == "multiple_choice":
        pairs += tuple(("", answer) for _, answer in pairs)
    return Wanted(pairs, context if kind == "infilling" else None)


def outcome(task: EvalTask, question: Question, likelihoods: Sequence[Likelihood], written: Written | None) -> Outcome:
    """The result of a question: `likelihoods` of its pairs, or of its document, and the text of its prompt."""
    kind = task.keys.output_type
    if kind == "loglikelihood_rolling":
        return _rolling(question, likelihoods[0])
    if kind == "classification":
        return _classified(question, likelihoods, written)
    if kind == "multiple_choice":
        return _chosen(question, likelihoods)
    if kind in ("cloze", "loglikelihood"):
        return _completed(question, likelihoods)
    return _answered(question, likelihoods, written)


def _chosen(question: Question, likelihoods: Sequence[Likelihood]) -> Outcome:
    count = len(question.choices)
    sums, alone = [one.total for one in likelihoods[:count]], [one.total for one in likelihoods[count:]]
    characters, sizes = list(map(len, question.choices)), list(map(utf8_bytes, question.choices))
    picks = choice_picks(ChoiceSums(sums, [one.tokens for one in likelihoods[:count]], characters, sizes, alone))
    values = {name: float(place in question.right) for name, place in picks.items()}
    return Outcome(values, {"logprobs": sums, "unconditional": alone, "picked": picks})


def _classified(question: Question, likelihoods: Sequence[Likelihood], written: Written | None) -> Outcome:
    label = question.choices[question.right[0]]
    if written is not None:
        predicted = read_label(written.text, question.choices)
        return Outcome({"acc": float(predicted == label)}, {"answer": written.text, "predicted": predicted}, label, predicted)
    sums = [one.total for one in likelihoods]
    chosen = question.choices[sums.index(max(sums))]
    return Outcome({"acc": float(chosen == label)}, {"logprobs": sums, "predicted": chosen}, label, chosen)


def read_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that an answer begins with, whatever its case, after blanks and marks; the longest of several; None if it is none."""
    said = re.sub(r"^[\W_]+", "", text).casefold()
    found = [label for label in labels if _begins(said, label.casefold())]
    return max(found, key=len, default=None)


def _begins(text: str, word: str) -> bool:
    """Whether a text begins with a word; one of Latin letters ends where the text's word does."""
    rest = text[len(word) :]
    whole = not (word[-1:].isascii() and rest[:1].isascii() and word[-1:].isalnum() and rest[:1].isalnum())
    return text.startswith(word) and whole


def _completed(question: Question, likelihoods: Sequence[Likelihood]) -> Outcome:
    sums = [one.total for one in likelihoods]
    if question.choices:
        place = sums.index(max(sums))
        of = likelihoods[question.right[0]]
        values = {"acc": float(place in question.right), "nats": -of.total, "tokens": float(of.tokens)}
        return Outcome(values, {"logprobs": sums, "picked": place})
    of = likelihoods[0]
    return Outcome(
        {"acc": float(of.greedy), "nats": -of.total, "tokens": float(of.tokens)}, {"logprob": of.total, "greedy": of.greedy}
    )


def _answered(question: Question, likelihoods: Sequence[Likelihood], written: Written | None) -> Outcome:
    """An answer in words; for infilling also the log-probability of the right one."""
    text = "" if written is None else written.text
    values = {
        "exact_match": exact_match(text, question.targets),
        "f1": token_f1(text, question.targets),
    }
    record: dict[str, Any] = {"answer": text, "finish": "" if written is None else written.finish}
    if likelihoods:
        of = likelihoods[0]
        values |= {"acc": float(of.greedy), "nats": -of.total, "tokens": float(of.tokens)}
        record |= {"logprob": of.total, "greedy": of.greedy}
    return Outcome(values, record)


def _rolling(question: Question, likelihood: Likelihood) -> Outcome:
    text = question.targets[0]
    values = {
        "nats": -likelihood.total,
        "tokens": float(likelihood.tokens),
        "bytes": float(utf8_bytes(text)),
        "words": float(blank_words(text)),
    }
    return Outcome(values, {"logprob": likelihood.total, "tokens": likelihood.tokens})
