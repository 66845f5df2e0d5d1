"""How the use of a model differs from the set that it was evaluated on: lengths, scripts, log-probabilities, refusals, thumbs.

The population stability index of a measure is the sum over bins of (p - q) ln(p / q), with p the share in use and q in the evaluation
set; bins are the tenths of the evaluation set, or categories. By a rule of thumb below 0.1 is no change, above 0.25 a shift (Siddiqi,
Credit Risk Scorecards, 2006). With few texts it is above 0 by chance: by (bins - 1)(1/n + 1/m) on average, which is shown beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.files import OneLine, opened
from megatrain.serving.answer_signals import SCRIPTS, is_refusal, repetition, script
from megatrain.untrusted import parse_json, read_plain

BINS = 10
MODERATE, SHIFTED = 0.1, 0.25
_LARGEST = 1 << 30
_PROMPTS = ("prompt", "question", "query", "instruction", "input", "context", "text", "document", "sentence")
_ANSWERS = ("answer", "output", "completion", "response", "target", "targets", "label")


class DriftError(OneLine, ValueError):
    """A log or an evaluation set that cannot be compared; the message says what to do."""


@dataclass(frozen=True)
class Exchange:
    """One question with its answer; what is not known of it is None."""

    prompt: str | None = None
    answer: str | None = None
    logprob: float | None = None
    """Mean log-probability of the answer's tokens, in nats."""
    tokens: Sequence[int] | None = None
    """The answer's."""
    rating: str | None = None
    """up or down."""


@dataclass(frozen=True)
class Measure:
    """Something that is measured of each exchange: a number, or a category."""

    name: str
    of: Callable[[Exchange], float | str | None]
    categories: tuple[str, ...] = ()


MEASURES = (
    Measure("characters of the prompt", lambda each: None if each.prompt is None else float(len(each.prompt))),
    Measure("characters of the answer", lambda each: None if each.answer is None else float(len(each.answer))),
    Measure("log-probability of a token", lambda each: each.logprob),
    Measure("repetition in the answer", lambda each: None if each.tokens is None else repetition(each.tokens)),
    Measure("script of the prompt", lambda each: None if each.prompt is None else script(each.prompt), SCRIPTS),
    Measure("script of the answer", lambda each: None if each.answer is None else script(each.answer), SCRIPTS),
    Measure(
        "refuses", lambda each: None if each.answer is None else ("yes" if is_refusal(each.answer) else "no"), ("yes", "no")
    ),
    Measure("thumb", lambda each: each.rating, ("up", "down")),
)


@dataclass(frozen=True)
class Drift:
    """One measure, in use and in the evaluation set."""

    measure: Measure
    used: Sequence[float | str]
    evaluated: Sequence[float | str]
    edges: tuple[float, ...]
    """Between bins; none for categories."""
    shares: tuple[tuple[float, float], ...]
    """(in use, in the evaluation set) of each bin."""
    psi: float | None
    """None where one of the two has none."""
    by_chance: float | None

    @property
    def verdict(self) -> str:
        """The index in a word."""
        if self.psi is None or self.by_chance is None:
            return "one side has none" if self.used or self.evaluated else "none"
        above = self.psi - self.by_chance
        return "shifted" if above > SHIFTED else "some change" if above > MODERATE else "the same"


def drifts(used: Sequence[Exchange], evaluated: Sequence[Exchange]) -> list[Drift]:
    """All measures that either side has."""
    found = (_drift(measure, _values(measure, used), _values(measure, evaluated)) for measure in MEASURES)
    return [drift for drift in found if drift.used or drift.evaluated]


def _values(measure: Measure, exchanges: Iterable[Exchange]) -> list[float | str]:
    return [value for each in exchanges if (value := measure.of(each)) is not None]


def _drift(measure: Measure, used: list[Any], evaluated: list[Any]) -> Drift:
    edges: tuple[float, ...] = ()
    if measure.categories:
        counts = [[values.count(each) for each in measure.categories] for values in (used, evaluated)]
        kept = [place for place in range(len(measure.categories)) if counts[0][place] or counts[1][place]]
        counts = [[each[place] for place in kept] for each in counts]
    else:
        edges = bin_edges(evaluated or used)
        counts = [np.bincount(np.digitize(values, edges), minlength=len(edges) + 1).tolist() for values in (used, evaluated)]
    shares = tuple((a / max(1, len(used)), b / max(1, len(evaluated))) for a, b in zip(*counts, strict=True))
    if not (used and evaluated):
        return Drift(measure, used, evaluated, edges, shares, None, None)
    chance = (len(shares) - 1) * (1 / len(used) + 1 / len(evaluated))
    return Drift(measure, used, evaluated, edges, shares, psi(*counts), chance)


def bin_edges(values: Sequence[float]) -> tuple[float, ...]:
    """The values between the tenths of a set; fewer where many are equal, none of an empty one."""
    if not values:
        return ()
    return tuple(float(edge) for edge in np.unique(np.quantile(np.asarray(values, float), np.linspace(0, 1, BINS + 1)[1:-1])))


def psi(used: Sequence[int], evaluated: Sequence[int]) -> float:
    """The population stability index of counts in bins; half a text is added to each bin, so that an empty one is no infinity."""
    a, b = (np.asarray(counts, float) + 0.5 for counts in (used, evaluated))
    p, q = a / a.sum(), b / b.sum()
    return float(((p - q) * np.log(p / q)).sum())


# --- files ------------------------------------------------------------------------------------------------------------------------


def read_log(path: Path, feedback: Path | None = None) -> list[Exchange]:
    """The exchanges of a log, its older parts first; with the thumbs of a file of feedback. Raises DriftError, OSError."""
    ratings = {} if feedback is None else {str(row.get("request")): row.get("rating") for _, row in _lines(feedback)}
    older = [file for file in path.parent.glob(f"{path.name}.*") if file.suffix[1:].isdigit()]
    files = [*sorted(older, key=lambda file: -int(file.suffix[1:])), path]
    found = [each for file in files for place, row in _lines(file) for each in _of_log(place, row, ratings)]
    if not found:
        raise DriftError(f"{path} has no answers that were finished. Write a log with `megatrain serve --log {path}`.")
    return found


def _of_log(place: str, row: Mapping[str, Any], ratings: Mapping[Any, Any]) -> list[Exchange]:
    """The choices of the record at a place. Raises DriftError."""
    try:
        return list(exchanges_of_log(row, ratings))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise DriftError(
            f"{place} is no record of `megatrain serve --log`, or a part of one ({type(error).__name__}: {error}). Take the line out."
        ) from None


def exchanges_of_log(row: Mapping[str, Any], ratings: Mapping[Any, Any]) -> Iterator[Exchange]:
    """The choices of one record of a log, if it was answered to its end."""
    if row.get("ended") != "done":
        return
    asked = row["asked"]
    prompts = asked.get("prompt") or [_last_question(asked.get("messages", ()))]
    for place, choice in enumerate(row["choices"]):
        logprobs, tokens, rating = choice["logprobs"], choice.get("tokens"), ratings.get(str(row["id"]))
        mean = sum(logprobs) / len(logprobs) if logprobs else math.nan
        yield Exchange(
            str(prompts[place * len(prompts) // len(row["choices"])]),
            str(choice["text"]),
            mean if math.isfinite(mean) else None,
            None if tokens is None else list(map(int, tokens)),
            rating if rating in ("up", "down") else None,
        )


def read_evaluation(path: Path) -> list[Exchange]:
    """The items of an evaluation: lines of JSON (a task's items, what `megatrain eval` writes of them, or another log), or a JSON file of
    such objects in a list, or of its results. Raises DriftError, OSError.
    """
    if path.suffix == ".json":
        try:
            value = parse_json(read_plain(path, _LARGEST), 1 << 26)
        except ValueError as error:
            raise DriftError(f"{path} is not JSON: {error}.") from None
        try:
            rows = value if isinstance(value, list) else list(_results(value))
        except (AttributeError, TypeError, ValueError) as error:
            raise DriftError(f"{path} is no file of results: {error}.") from None
    else:
        rows = [row for _, row in _lines(path)]
    if rows and isinstance(rows[0], dict) and "choices" in rows[0] and "asked" in rows[0]:
        return read_log(path)
    found = [each for row in rows if isinstance(row, dict) and (each := exchange_of_item(row)) != Exchange()]
    if not found:
        raise DriftError(
            f"{path} has no items with a text. Give lines of JSON with a prompt (one of {', '.join(_PROMPTS)}) and "
            "perhaps an answer: a task's .jsonl, or what `megatrain eval --items` writes."
        )
    return found


def exchange_of_item(row: Mapping[str, Any]) -> Exchange:
    """An item of an evaluation."""
    messages = row.get("messages")
    prompt = _last_question(messages) if isinstance(messages, list) else _first_text(row, _PROMPTS)
    answer = _first_text(row, _ANSWERS)
    choices = row.get("choices")
    if isinstance(choices, list) and isinstance(row.get("answer"), int) and 0 <= row["answer"] < len(choices):
        answer = str(choices[row["answer"]])
    values = row.get("values", {}) if isinstance(row.get("values"), dict) else {}
    total, count = (row.get(key, values.get(key)) for key in ("logprob", "tokens"))
    known = isinstance(total, int | float) and isinstance(count, int | float) and count > 0 and math.isfinite(total)
    return Exchange(prompt, answer, total / count if known else None)


def _results(value: Any) -> Iterator[dict[str, Any]]:
    """The items of a file of results, which has their numbers alone."""
    for task in value.get("tasks", {}).values() if isinstance(value, dict) else ():
        values = task.get("per_item", {}).get("values", {})
        columns = [key for key in ("logprob", "tokens") if key in values]
        yield from (dict(zip(columns, row, strict=True)) for row in zip(*(values[key] for key in columns), strict=True))


def _last_question(messages: Sequence[Any]) -> str:
    asked = (each for each in reversed(messages) if isinstance(each, dict) and each.get("role") == "user")
    return next((str(each.get("content", "")) for each in asked), "")


def _first_text(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    for name in names:
        value = row.get(name)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str):
            return value
    return None


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, the object there). A last line without an end is still being written, and no part of it yet."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                row = parse_json(line, unique=False)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise DriftError(f"{path}:{number} is no line of JSON: {error}.") from None
            if isinstance(row, dict):
                yield f"{path}:{number}", row
