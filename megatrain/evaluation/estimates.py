"""The metrics of a task, each with its 95% interval, from what came of its items."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatrain.evaluation.class_intervals import class_estimates, clustered_class_estimates
from megatrain.evaluation.confusion import ClassReport, Confusion
from megatrain.evaluation.intervals import Estimate, mean, proportion
from megatrain.evaluation.likelihood import bits_per_byte, perplexity
from megatrain.evaluation.tasks import EvalTask
from megatrain.evaluation.translation_scores import CorpusScore, corpus_bleu, corpus_chrf
from megatrain.evaluation.wanted import Outcome

Clusters = Sequence[Hashable] | None
_CUT = {"zh": "zh", "en": "13a"}
"""Language of the right answers -> how BLEU cuts text."""
_UNITS = {"perplexity": "tokens", "byte_perplexity": "bytes", "word_perplexity": "words"}


@dataclass(frozen=True)
class Estimates:
    """The metrics of a task."""

    metrics: dict[str, Estimate]
    report: ClassReport | None = None
    """All scores of a classification."""
    confusion: Confusion | None = None
    corpora: dict[str, CorpusScore] = field(default_factory=dict)
    """BLEU and chrF with their signatures."""


def estimates_of(task: EvalTask, outcomes: Sequence[Outcome], places: Sequence[int] | None = None) -> Estimates:
    """The metrics of a task. places: of the items that count; None: all. Raises ImportError where BLEU needs sacrebleu."""
    chosen = range(len(outcomes)) if places is None else places
    some = [outcomes[place] for place in chosen]
    clusters = [task.questions[place].cluster for place in chosen] if task.keys.cluster is not None else None
    if task.keys.output_type == "classification":
        return _of_classes(task, some, clusters)
    corpora = _corpora(task, some, [list(task.questions[place].targets) for place in chosen])
    metrics = {name: _metric(name, some, clusters, corpora) for name in task.keys.metrics}
    return Estimates(metrics, corpora=corpora)


def _of_classes(task: EvalTask, outcomes: Sequence[Outcome], clusters: Clusters) -> Estimates:
    labels, predicted = [one.label for one in outcomes], [one.predicted for one in outcomes]
    classes = tuple(dict.fromkeys(choice for question in task.questions for choice in question.choices))
    confusion = Confusion.of(classes, labels, predicted)
    found = (
        class_estimates(confusion) if clusters is None else clustered_class_estimates(confusion, labels, predicted, clusters)
    )
    return Estimates({name: found[name] for name in task.keys.metrics}, confusion.report(), confusion)


def _corpora(task: EvalTask, outcomes: Sequence[Outcome], references: list[list[str]]) -> dict[str, CorpusScore]:
    answers = [str(one.record.get("answer", "")) for one in outcomes]
    found = {}
    if "bleu" in task.keys.metrics:
        found["bleu"] = corpus_bleu(answers, references, _CUT.get(task.keys.language or ""))
    if "chrf" in task.keys.metrics:
        found["chrf"] = corpus_chrf(answers, references)
    return found


def _metric(name: str, outcomes: Sequence[Outcome], clusters: Clusters, corpora: dict[str, CorpusScore]) -> Estimate:
    """One metric."""
    if name in corpora:
        return corpora[name].estimate(clusters)

    def values(of: str) -> list[float]:
        return [one.values[of] for one in outcomes]

    if name == "bits_per_byte":
        return bits_per_byte(values("nats"), values("bytes"), clusters)
    if name in _UNITS:
        return perplexity(values("nats"), values(_UNITS[name]), clusters)
    if name == "f1" or clusters is not None:
        return mean(values(name), clusters)
    return proportion(round(sum(values(name))), len(outcomes))


def as_json(estimate: Estimate) -> dict[str, Any]:
    """An estimate for a file of results; what is not finite is null there."""
    numbers = {name: finite(getattr(estimate, name)) for name in ("value", "low", "high", "stderr")}
    return {**numbers, "units": estimate.units, "interval": estimate.method}


def finite(number: float) -> float | None:
    """A number, or None for one that JSON has not."""
    return number if math.isfinite(number) else None
