"""Two files of results, compared item by item: `megatrain eval --compare A.json B.json`."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.evaluation.class_intervals import item_margins, margins_of
from megatrain.evaluation.comparison import (
    LEVEL,
    PairedDifference,
    among_all,
    compare_means,
    compare_proportions,
    compare_sums,
    pairing,
)
from megatrain.evaluation.confusion import SCORES
from megatrain.evaluation.intervals import Floats
from megatrain.evaluation.items import TaskError
from megatrain.evaluation.results import FORMAT
from megatrain.evaluation.translation_scores import score_of
from megatrain.untrusted import parse_json, read_plain

LARGEST_RESULTS = 1 << 30
_UNITS = {"perplexity": "tokens", "byte_perplexity": "bytes", "word_perplexity": "words", "bits_per_byte": "bytes"}
LOWER_IS_BETTER = frozenset(_UNITS)


@dataclass(frozen=True)
class ComparedMetric:
    """A metric of a task, of both models."""

    task: str
    metric: str
    difference: PairedDifference


def read_results(path: Path) -> dict[str, Any]:
    """A file of results. Raises TaskError."""
    try:
        found = parse_json(read_plain(path, LARGEST_RESULTS), 1 << 26)
    except FileNotFoundError:
        raise TaskError(
            f"{path}: no such file of results. `megatrain eval MODEL --tasks ... --json {path}` writes it."
        ) from None
    except (OSError, ValueError) as error:
        raise TaskError(f"{path} is no file of results: {getattr(error, 'strerror', None) or error}.") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("tasks"), dict):
        raise TaskError(
            f"{path} is no file of results of this release: `megatrain eval MODEL --tasks ... --json {path}` writes one."
        )
    return found


def compared(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[ComparedMetric]:
    """The metrics that both results have, by task. Raises TaskError, UnpairedError where they are not of the same items."""
    tasks = [name for name in first["tasks"] if name in second["tasks"]]
    if not tasks:
        raise TaskError(
            f"the results have no task in common: {', '.join(first['tasks'])} and {', '.join(second['tasks'])}. Evaluate both with the "
            "same --tasks."
        )
    found = []
    for name in tasks:
        found += _compared(name, first["tasks"][name], second["tasks"][name])
    return found


def _compared(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[ComparedMetric]:
    """The metrics that both results of a task have. Raises TaskError, UnpairedError."""
    found = []
    try:
        places = pairing(before["per_item"]["ids"], after["per_item"]["ids"], before["hash"], after["hash"])
        for metric in before["metrics"]:
            if metric in after["metrics"]:
                classes = before.get("confusion", {}).get("classes", [])
                difference = _difference(metric, classes, before["per_item"], _ordered(after["per_item"], places.tolist()))
                found.append(ComparedMetric(name, metric, difference))
    except (LookupError, TypeError, AttributeError) as error:
        raise TaskError(
            f"{name}: a part of the results is missing or of another kind ({type(error).__name__}: {error}). Files are compared as they "
            "were written: evaluate once more."
        ) from None
    return found


def _ordered(items: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """The lists of a file with an entry for each item, in the order of `places`."""
    lists = {name: [of[place] for place in places] for name, of in items.items() if isinstance(of, list)}
    groups = {
        name: {key: [of[place] for place in places] for key, of in group.items()}
        for name, group in items.items()
        if isinstance(group, dict)
    }
    return {**lists, **groups}


def _difference(metric: str, classes: Sequence[str], before: Mapping[str, Any], after: Mapping[str, Any]) -> PairedDifference:
    """The difference of a metric."""
    clusters: Sequence[Hashable] | None = before.get("clusters")
    if metric in before["statistics"]:
        first, second = (np.array(one["statistics"][metric], dtype=np.float64) for one in (before, after))
        return compare_sums(first, second, score_of("bleu" if metric == "bleu" else "chrf"), clusters)
    if classes and metric != "accuracy":
        first, second = (item_margins(classes, one["labels"], one["predicted"]) for one in (before, after))
        return compare_sums(first, second, lambda sums: SCORES[metric](margins_of(sums)), clusters)
    if metric in _UNITS:
        first, second = (_ratios(metric, one["values"]) for one in (before, after))
        return compare_sums(first, second, lambda sums: _of_ratio(metric, sums), clusters)
    name = "acc" if metric == "accuracy" else metric
    mine, theirs = before["values"][name], after["values"][name]
    if clusters is None and metric != "f1":
        return compare_proportions([bool(one) for one in mine], [bool(one) for one in theirs])
    return compare_means(mine, theirs, clusters)


def _ratios(metric: str, values: Mapping[str, Any]) -> Floats:
    """[n, 2] nats and units of each item."""
    numbers = [[math.inf if one is None else one for one in values[name]] for name in ("nats", _UNITS[metric])]
    return np.array(numbers, dtype=np.float64).T


def _of_ratio(metric: str, sums: Floats) -> Floats:
    """A perplexity, or bits per byte, of sums [b, 2]."""
    nats = sums[:, 0] / sums[:, 1]
    return nats / math.log(2.0) if metric == "bits_per_byte" else np.exp(np.minimum(nats, 700.0))


SETTINGS = ("num_fewshot", "seed", "limit", "chat")


def differences_of_manner(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    """How the two were asked differently."""
    for name in SETTINGS:
        values = [one.get("asked", {}).get(name) for one in (first, second)]
        if values[0] != values[1]:
            yield f"they were not asked alike: {name} is {values[0]} and {values[1]}"
    for task, of in first["tasks"].items():
        other = second["tasks"].get(task)
        if other is not None and of.get("num_fewshot") != other.get("num_fewshot"):
            yield f"{task}: not asked alike, with {of.get('num_fewshot')} and {other.get('num_fewshot')} examples"


def verdicts(found: Sequence[ComparedMetric]) -> Iterator[str]:
    """The first metric of each task in a sentence."""
    for number, one in enumerate(found):
        if not number or found[number - 1].task != one.task:
            yield f"{one.task} {one.metric}: {one.difference.verdict(lower_is_better=one.metric in LOWER_IS_BETTER)}"


def comparison_table(found: Sequence[ComparedMetric]) -> str:
    """The differences as lines of text."""
    rows = [("task", "metric", "first", "second", "difference", "95% interval", "p", "seen from")]
    together = among_all([one.difference.p for one in found])
    for number, one in enumerate(found):
        of = one.difference
        name = "" if number and found[number - 1].task == one.task else one.task
        mark = " **" if together[number] < LEVEL else " *" if of.seen else ""
        rows.append(
            (
                name,
                one.metric,
                f"{of.first:.4f}",
                f"{of.second:.4f}",
                f"{of.value:+.4f}{mark}",
                f"{of.low:+.4f} - {of.high:+.4f}",
                f"{of.p:.3f}",
                f"{of.detectable:.4f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    seen = sum(one.difference.seen for one in found)
    told = "are" if seen != 1 else "is"
    legend = (
        f"{seen} of {len(found)} differences {told} more than chance would explain (*: p < 0.05, paired by item; **: also among all of "
        "these comparisons, by Holm). `seen from`: the smallest true difference that so many items would show four times in five."
    )
    return "\n".join([*lines, legend])
