"""The results of tasks as a table, and as files: JSON with all that makes them repeatable, and a line for each item.

task           metric     value   95% interval    items
capitals_en    acc        0.7708  0.635 - 0.867      48
               acc_norm   0.7292  0.590 - 0.834      48
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.evaluation.asking import AskedTask
from megatrain.evaluation.class_intervals import per_class_estimates
from megatrain.evaluation.contamination import ItemOverlap
from megatrain.evaluation.estimates import Estimates, as_json, estimates_of, finite
from megatrain.evaluation.intervals import Estimate, macro_average
from megatrain.evaluation.tasks import EvalTask
from megatrain.evaluation.wanted import Outcome
from megatrain.files import whole

FORMAT = "megatrain-eval-1"
"""Names the format of the file; another one is not compared."""


@dataclass(frozen=True)
class TaskResult:
    """A task with its outcomes and metrics."""

    asked: AskedTask
    outcomes: tuple[Outcome, ...]
    estimates: Estimates
    seconds: float
    overlaps: tuple[ItemOverlap, ...] | None = None
    """The overlap of each item with the training data; None where nobody looked."""

    @property
    def task(self) -> EvalTask:
        """The task."""
        return self.asked.task

    @property
    def unfinished(self) -> int:
        """Answers that were cut at max_gen_toks."""
        return sum(one.record.get("finish") == "length" for one in self.outcomes)

    def part(self, dirty: bool) -> Estimates | None:
        """The metrics of the items that the training data has, or of the others; None where there are none."""
        places = [place for place, one in enumerate(self.overlaps or ()) if one.dirty == dirty]
        return estimates_of(self.task, self.outcomes, places) if places else None


def table(results: Sequence[TaskResult]) -> str:
    """The metrics of tasks as lines of text, with what is to be said about them below."""
    rows = [("task", "metric", "value", "95% interval", "items")]
    for result in results:
        for number, (name, of) in enumerate(result.estimates.metrics.items()):
            interval = f"{_short(of.low)} - {_short(of.high)}"
            rows.append(
                (result.task.name if number == 0 else "", name, _short(of.value), interval, f"{len(result.outcomes):,}")
            )
    for name, of in averages(results).items():
        rows.append((f"mean of {of.units} tasks", name, _short(of.value), f"{_short(of.low)} - {_short(of.high)}", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            text.rjust(width) if place in (2, 4) else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *(line for result in results for line in notes(result))])


def averages(results: Sequence[TaskResult]) -> dict[str, Estimate]:
    """The mean over tasks of each metric that is the first one of several of them, each task counting the same; no perplexities."""
    mains: dict[str, list[Estimate]] = {}
    for result in results:
        name, of = next(iter(result.estimates.metrics.items()))
        mains.setdefault(name, []).append(of)
    return {name: macro_average(each) for name, each in mains.items() if len(each) > 1 and not name.endswith("perplexity")}


def notes(result: TaskResult) -> Iterator[str]:
    """Remarks on a task's numbers."""
    name, asked, count = result.task.name, result.asked, len(result.outcomes)
    if asked.truncated:
        yield f"{name}: {asked.truncated} of {count} items are longer than the model, which has not seen all of them (else --long refuse)"
    if asked.spanned:
        yield f"{name}: {asked.spanned} answers were encoded alone, as a token would have spanned the join with their context"
    if result.unfinished:
        yield f"{name}: {result.unfinished} of {count} answers were cut at the longest that was allowed (generation_kwargs.max_gen_toks)"
    for metric, corpus in result.estimates.corpora.items():
        yield f"{name}: {metric} is {corpus.signature}"
    if result.estimates.report is not None:
        yield from (f"{name}: {said}" for said in result.estimates.report.notes)
    if result.overlaps is not None:
        yield from _contamination(result, result.overlaps)


def _contamination(result: TaskResult, overlaps: Sequence[ItemOverlap]) -> Iterator[str]:
    dirty, short = sum(one.dirty for one in overlaps), sum(not one.grams for one in overlaps)
    main = next(iter(result.estimates.metrics))
    scores = {
        which: f"{_short(of.metrics[main].value)} ({_short(of.metrics[main].low)} - {_short(of.metrics[main].high)})"
        for which, of in (("clean", result.part(dirty=False)), ("dirty", result.part(dirty=True)))
        if of is not None
    }
    told = ", ".join(f"{main} of the {which} ones {score}" for which, score in scores.items())
    yield (
        f"{result.task.name}: the training data has 13 words in a row of {dirty} of {len(overlaps)} items ({dirty / len(overlaps):.1%}); "
        f"{short} are too short to tell; {told}"
    )


def _short(number: float) -> str:
    """A number with four places, or as many as are worth reading."""
    return f"{number:.4f}" if abs(number) < 100 else f"{number:.1f}" if abs(number) < 1e6 else f"{number:.3g}"


def document(results: Sequence[TaskResult], about: Mapping[str, Any]) -> dict[str, Any]:
    """The results as one JSON object. about: the model, how tasks were asked, and with what."""
    means = {name: as_json(one) for name, one in averages(results).items()}
    tasks = {result.task.name: _task_object(result) for result in results}
    return {"format": FORMAT, **about, "averages": means, "tasks": tasks}


def _task_object(result: TaskResult) -> dict[str, Any]:
    task, asked, estimates = result.task, result.asked, result.estimates
    found: dict[str, Any] = {
        "hash": task.identity,
        "output_type": task.keys.output_type,
        "num_fewshot": asked.shots,
        "items": len(result.outcomes),
        "metrics": {name: as_json(one) for name, one in estimates.metrics.items()},
        "truncated": asked.truncated,
        "joins_encoded_alone": asked.spanned,
        "answers_cut": result.unfinished,
        "seconds": round(result.seconds, 3),
        "first": first_prompt(asked),
        "signatures": {name: one.signature for name, one in estimates.corpora.items()},
    }
    if estimates.confusion is not None and estimates.report is not None:
        intervals = per_class_estimates(estimates.confusion)
        found["confusion"] = {
            "classes": list(estimates.confusion.classes),
            "counts": estimates.confusion.counts.tolist(),
            "per_class": {
                one.name: {
                    **{name: as_json(of) for name, of in intervals[one.name].items()},
                    "support": one.support,
                    "predicted": one.predicted,
                }
                for one in estimates.report.classes
            },
            "unread": estimates.report.unread,
        }
    if result.overlaps is not None:
        found["contamination"] = _shares(result, result.overlaps)
    found["per_item"] = _per_item(result)
    return found


def _shares(result: TaskResult, overlaps: Sequence[ItemOverlap]) -> dict[str, Any]:
    """How many items the training data has, and the metrics of those and of the others."""
    found: dict[str, Any] = {"dirty": sum(one.dirty for one in overlaps), "too_short": sum(not one.grams for one in overlaps)}
    for which, of in (("clean_scores", result.part(dirty=False)), ("dirty_scores", result.part(dirty=True))):
        found[which] = None if of is None else {name: as_json(one) for name, one in of.metrics.items()}
    return found


def first_prompt(asked: AskedTask) -> dict[str, Any]:
    """The first item as it was sent: text, and token ids."""
    wanted, scored, continued = asked.wanted[0], asked.scored[0], asked.continued[0]
    found: dict[str, Any] = {}
    if wanted.document is not None:
        window = scored[0].windows[0]
        found = {"document": wanted.document[:1000], "tokens": list(window.tokens[:1000])}
    elif wanted.pairs:
        window = scored[0].windows[0]
        context, answer = wanted.pairs[0]
        found = {"text": context, "answer": answer, "tokens": list(window.tokens), "scored_from": window.first}
    if continued is not None:
        found |= {"prompt": wanted.prompt, "prompt_tokens": list(continued.tokens)}
    return found


def _per_item(result: TaskResult) -> dict[str, Any]:
    """The values of each item that a comparison of two models needs."""
    outcomes, corpora = result.outcomes, result.estimates.corpora
    found: dict[str, Any] = {"ids": item_ids(result.task)}
    found["values"] = {name: [finite(one.values[name]) for one in outcomes] for name in outcomes[0].values}
    if result.task.keys.cluster is not None:
        found["clusters"] = [one.cluster for one in result.task.questions]
    if result.estimates.confusion is not None:
        found |= {"labels": [one.label for one in outcomes], "predicted": [one.predicted for one in outcomes]}
    found["statistics"] = {name: one.statistics.tolist() for name, one in corpora.items()}
    return found


def item_ids(task: EvalTask) -> list[str]:
    """A name of each item that no other has: its hash, with a number where the task has the same item again."""
    times: Counter[str] = Counter()
    ids = []
    for question in task.questions:
        identity = question.item.identity
        times[identity] += 1
        ids.append(identity if times[identity] == 1 else f"{identity}#{times[identity]}")
    return ids


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    """Write a file of results, whole or not at all. Raises OSError."""
    with whole(path, text=True) as file:
        file.write(json.dumps(found, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def write_items(path: Path, results: Sequence[TaskResult]) -> None:
    """Write a line of JSON for each item, with what was asked and what came of it, whole or not at all. Raises OSError."""
    with whole(path, text=True) as file:
        for result in results:
            for number, line in enumerate(_lines(result)):
                file.write(json.dumps({"task": result.task.name, "item": number, **line}, ensure_ascii=False) + "\n")


def _lines(result: TaskResult) -> Iterator[dict[str, Any]]:
    parts = zip(result.task.questions, result.asked.wanted, result.outcomes, strict=True)
    for place, (question, wanted, outcome) in enumerate(parts):
        line: dict[str, Any] = {"id": question.item.identity, "file": question.item.file, "line": question.item.line}
        line["prompt"] = wanted.prompt or (wanted.pairs[0][0] if wanted.pairs else None)
        line |= {"choices": list(question.choices)} if question.choices else {}
        if wanted.document is None:
            line["targets"] = list(question.targets)
        line |= {**outcome.record, "values": outcome.values}
        if result.overlaps is not None:
            line["overlap"] = {"grams": result.overlaps[place].grams, "found": result.overlaps[place].found}
        yield line
