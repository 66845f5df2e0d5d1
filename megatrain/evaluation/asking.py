"""Asks a model the questions of tasks: all texts become tokens first, on every rank, so that what is wrong is told before anything runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from megatrain.evaluation.items import TaskError
from megatrain.evaluation.prepared import Preparing, ToContinue, ToScore
from megatrain.evaluation.prompts import Manner, contexts_of
from megatrain.evaluation.scoring import Advance, Likelihood, answers_of, on_replicas, sums_of
from megatrain.evaluation.tasks import EvalTask
from megatrain.evaluation.wanted import Outcome, Wanted, Written, outcome, wanted
from megatrain.extras import need
from megatrain.inference.engine import Engine
from megatrain.inference.requests import Request, Sampling
from megatrain.parallel.mesh import ParallelContext


@dataclass(frozen=True)
class AskedTask:
    """A task as tokens."""

    task: EvalTask
    shots: int
    wanted: tuple[Wanted, ...]
    scored: tuple[tuple[ToScore, ...], ...]
    """The scored texts of each question."""
    continued: tuple[ToContinue | None, ...]
    """The prompt of each question; None where nothing is written."""
    requests: tuple[Request | None, ...]
    """The same as the engine is asked."""

    @property
    def size(self) -> int:
        """Number of requests."""
        windows = {window for of in self.scored for one in of for window in one.windows}
        return len(windows) + sum(one is not None for one in self.requests)

    @property
    def largest(self) -> int:
        """The largest token id."""
        windows = (max(window.tokens) for of in self.scored for one in of for window in one.windows)
        return max(chain(windows, (max(one.tokens) for one in self.continued if one is not None)))

    @cached_property
    def truncated(self) -> int:
        """Items that are longer than the model: their beginning was cut, or they were read in windows."""
        parts = zip(self.scored, self.continued, strict=True)
        return sum(any(one.cut for one in scored) or (prompt is not None and prompt.cut) for scored, prompt in parts)

    @cached_property
    def spanned(self) -> int:
        """Answers that were encoded alone, as a token would have spanned the join."""
        return sum(one.spanned for of in self.scored for one in of)


def prepare(task: EvalTask, manner: Manner, texts: Preparing, max_length: int) -> AskedTask:
    """A task as tokens. Raises TaskError that names the item."""
    contexts = contexts_of(task, manner)
    asked = tuple(wanted(task, question, text, manner) for question, text in zip(task.questions, contexts, strict=True))
    writing = task.keys.generation_kwargs
    most = min(writing.max_gen_toks, max(max_length // 2, 1))
    scored, continued, requests = [], [], []
    for question, one in zip(task.questions, asked, strict=True):
        try:
            scored.append(_to_score(one, texts))
            continued.append(None if one.prompt is None else texts.prompt(one.prompt, most))
        except ValueError as error:
            question.item.refuse(str(error))
        if manner.refuse_long and (any(part.cut for part in scored[-1]) or (continued[-1] is not None and continued[-1].cut)):
            question.item.refuse(
                f"the item is longer than the model, which has {max_length} positions. Use --long cut, fewer examples, or a shorter item."
            )
        requests.append(_request(task, continued[-1], texts, most, _seed(manner.seed, question.item.identity)))
    return AskedTask(task, manner.shots(task), asked, tuple(scored), tuple(continued), tuple(requests))


def _to_score(one: Wanted, texts: Preparing) -> tuple[ToScore, ...]:
    """The texts that are scored for a question."""
    if one.document is not None:
        found = texts.document(one.document)
        if not found.windows:
            raise ValueError("the document has no tokens, so it has none to score.")
        return (found,)
    return tuple(texts.pairs(one.pairs))


def _request(task: EvalTask, prompt: ToContinue | None, texts: Preparing, most: int, seed: int) -> Request | None:
    """The request for a written answer."""
    if prompt is None:
        return None
    writing = task.keys.generation_kwargs
    temperature = 1.0 if writing.greedy else writing.temperature
    sampling = Sampling(writing.greedy, temperature, writing.top_k, writing.top_p, never=texts.never)
    stops = tuple(filter(None, (*writing.stops, *texts.stops)))
    return Request(prompt.tokens, most, sampling, seed=seed, ends=texts.ends, stops=stops, text=True, places=prompt.places)


def _seed(seed: int, item: str) -> int:
    """The seed of an item's answer."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {item}".encode(), digest_size=7).digest(), "big")


def ask(asked: AskedTask, engine: Engine, ctx: ParallelContext, advance: Advance = lambda _: None) -> list[Outcome]:
    """The outcome of each question, in order; the same on every rank (collective over the replicas)."""
    flat = [one for of in asked.scored for one in of]
    sums = iter(sums_of(engine, [one.windows for one in flat], ctx, advance))
    likelihoods = [[Likelihood(*next(sums), one.tokens, one.cut) for one in of] for of in asked.scored]
    texts = _written(asked.requests, engine, ctx, advance)
    parts = zip(asked.task.questions, likelihoods, texts, strict=True)
    return [outcome(asked.task, question, of, text) for question, of, text in parts]


def _written(
    requests: Sequence[Request | None], engine: Engine, ctx: ParallelContext, advance: Advance
) -> list[Written | None]:
    """The texts of requests, in order; the longest prompts are worked on first."""
    asked = sorted(((place, one) for place, one in enumerate(requests) if one is not None), key=lambda one: -len(one[1].tokens))

    def work(part: Sequence[tuple[int, Request]]) -> list[list[Any]]:
        answers = answers_of(engine, [one for _, one in part], advance)
        return [[one.text, one.finish, len(one.tokens)] for one in answers]

    found = on_replicas(engine, asked, lambda one: len(one[1].tokens) + one[1].max_tokens, work, ctx)
    texts: list[Written | None] = [None] * len(requests)
    for (place, _), (text, finish, tokens) in zip(asked, found, strict=True):
        texts[place] = Written(text, finish, tokens)
    return texts


def require_askable(tasks: Sequence[EvalTask], fills_blanks: bool) -> None:
    """Raise TaskError for a task of blanks where the model goes from left to right, MissingPackageError for one whose metric needs more."""
    for task in tasks:
        if task.keys.output_type == "infilling" and not fills_blanks:
            raise TaskError(
                f"{task.path}: infilling needs a model that fills blanks, a GLM, and this one goes from left to right. Use output_type: "
                "cloze, with the blank at the end, or with choices and ___."
            )
        if task.keys.output_type == "generate_until" and {"bleu", "chrf"} & set(task.keys.metrics):
            need("sacrebleu", f"the task {task.name} (its metrics bleu and chrf)", "eval")
