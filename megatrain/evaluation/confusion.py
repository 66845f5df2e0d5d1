"""Classification: one confusion matrix, and every score that follows from its margins.

For class i of k: t_i items of the class are predicted as it, s_i items have it (support), p_i predictions say it; n items. A prediction
that is no class (empty, not to be read) is a class of its own on the side of predictions, so p has k + 1 entries and such an answer is
wrong everywhere, not left out.

| score | formula | source |
|---|---|---|
| accuracy | sum t / n | |
| precision, recall, F1 of a class | t/p, t/s, 2t/(s + p) | |
| micro F1 | 2 sum t / (sum s + sum p over classes) | differs from accuracy by the answers that are no class |
| macro F1 | mean of F1 over all classes | |
| weighted F1 | mean of F1, weighted by s | |
| kappa | (sum t/n - e) / (1 - e), e = sum s p / n^2 | Cohen 1960 |
| MCC | (n sum t - sum s p) / sqrt((n^2 - sum s^2) (n^2 - sum p^2)) | Gorodkin 2004, R_K |
| alpha | 1 - (2n - 1) 2 (n - sum t) / ((2n)^2 - sum (s + p)^2) | Krippendorff 2011, nominal, two raters |

What would be 0/0 counts as 0, and `ClassReport.notes` says so. Equal to scikit-learn's and krippendorff's to 1e-12 (tested), which give
nan for kappa and alpha where chance never disagrees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatrain.evaluation.intervals import Floats

Counts = npt.NDArray[np.int64]
SHOWN = 5
"""Names in a note, at most."""


@dataclass(frozen=True, eq=False)
class Margins:
    """Sums over confusion matrices, any number of them at once: [..., k], [..., k] and [..., k + 1]; all that scores need."""

    hits: Floats
    support: Floats
    predicted: Floats
    """The last is of answers that are no class."""


Score = Callable[[Margins], Floats]
"""A score of each matrix, [...]."""


def accuracy(margins: Margins) -> Floats:
    """Share of items that are right."""
    return _divided(margins.hits.sum(axis=-1), margins.support.sum(axis=-1))


def class_precision(margins: Margins) -> Floats:
    """[..., k]."""
    return _divided(margins.hits, margins.predicted[..., :-1])


def class_recall(margins: Margins) -> Floats:
    """[..., k]."""
    return _divided(margins.hits, margins.support)


def class_f1(margins: Margins) -> Floats:
    """[..., k]."""
    return _divided(2.0 * margins.hits, margins.support + margins.predicted[..., :-1])


def micro_f1(margins: Margins) -> Floats:
    """F1 of all classes' counts together."""
    named = margins.predicted[..., :-1].sum(axis=-1)
    return _divided(2.0 * margins.hits.sum(axis=-1), margins.support.sum(axis=-1) + named)


def macro_f1(margins: Margins) -> Floats:
    """Plain mean of the classes' F1, those without items included."""
    return np.asarray(class_f1(margins).mean(axis=-1))


def weighted_f1(margins: Margins) -> Floats:
    """Mean of the classes' F1, weighted by support."""
    return _divided((class_f1(margins) * margins.support).sum(axis=-1), margins.support.sum(axis=-1))


def kappa(margins: Margins) -> Floats:
    """Cohen's kappa of labels and predictions."""
    items = margins.support.sum(axis=-1)
    chance = (margins.support * margins.predicted[..., :-1]).sum(axis=-1)
    return _divided(items * margins.hits.sum(axis=-1) - chance, items * items - chance)


def matthews(margins: Margins) -> Floats:
    """Matthews correlation coefficient of any number of classes."""
    items = margins.support.sum(axis=-1)
    together = items * margins.hits.sum(axis=-1) - (margins.support * margins.predicted[..., :-1]).sum(axis=-1)
    first = items * items - (margins.support**2).sum(axis=-1)
    second = items * items - (margins.predicted**2).sum(axis=-1)
    return _divided(together, np.sqrt(first) * np.sqrt(second))


def alpha(margins: Margins) -> Floats:
    """Krippendorff's alpha (nominal) of labels and predictions, an answer that is no class being a label as others are."""
    items = margins.support.sum(axis=-1)
    given = margins.predicted.copy()
    given[..., :-1] += margins.support
    chance = 4.0 * items * items - (given**2).sum(axis=-1)
    missed = (2.0 * items - 1.0) * 2.0 * (items - margins.hits.sum(axis=-1))
    return np.where(chance > 0.0, 1.0 - _divided(missed, chance), 0.0)


def _divided(above: Floats, below: Floats) -> Floats:
    """Quotient, 0 where it is 0/0."""
    above, below = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    return np.divide(above, below, out=np.zeros(np.broadcast_shapes(above.shape, below.shape)), where=below > 0.0)


SCORES: dict[str, Score] = {
    "accuracy": accuracy,
    "micro_f1": micro_f1,
    "macro_f1": macro_f1,
    "weighted_f1": weighted_f1,
    "kappa": kappa,
    "mcc": matthews,
    "alpha": alpha,
}
"""Scores of a matrix, by the name that tables use."""


@dataclass(frozen=True)
class ClassScore:
    """Scores of one class."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    """Items that have it."""
    predicted: int
    """Predictions that say it."""


@dataclass(frozen=True)
class ClassReport:
    """All that a confusion matrix says."""

    items: int
    unread: int
    """Answers that are no class."""
    scores: dict[str, float]
    """accuracy, micro_f1, macro_f1, weighted_f1, kappa, mcc, alpha."""
    classes: tuple[ClassScore, ...]
    notes: tuple[str, ...]
    """Scores that count as 0 though they are 0/0, and answers that are no class."""


@dataclass(frozen=True, eq=False)
class Confusion:
    """How often each class was answered by each: counts [k, k + 1], labels down, predictions across, the last column no class."""

    classes: tuple[str, ...]
    counts: Counts

    @classmethod
    def of(cls, classes: Sequence[str], labels: Sequence[str], predictions: Sequence[str | None]) -> Confusion:
        """Count items by label and prediction, both names of classes; a prediction that is none of them (empty, None) is no class.

        Raises ValueError for no items, lists of two lengths, a class named twice and a label that is no class.
        """
        rows, columns = class_numbers(classes, labels, predictions)
        return cls(tuple(classes), confusion_counts(rows, columns, len(classes)))

    @property
    def margins(self) -> Margins:
        """Margins of this one matrix."""
        counts = self.counts.astype(np.float64)
        return Margins(np.diagonal(counts).copy(), counts.sum(axis=1), counts.sum(axis=0))

    def report(self) -> ClassReport:
        """Every score and what is to be said of them."""
        margins = self.margins
        each = zip(
            self.classes,
            class_precision(margins).tolist(),
            class_recall(margins).tolist(),
            class_f1(margins).tolist(),
            self.counts.sum(axis=1).tolist(),
            self.counts.sum(axis=0).tolist(),
            strict=False,
        )
        scores = {name: float(score(margins)) for name, score in SCORES.items()}
        rows = tuple(ClassScore(*row) for row in each)
        unread, items = int(self.counts[:, -1].sum()), int(self.counts.sum())
        return ClassReport(items, unread, scores, rows, tuple(_notes(rows, unread, items)))


def class_numbers(classes: Sequence[str], labels: Sequence[str], predictions: Sequence[str | None]) -> tuple[Counts, Counts]:
    """[n] number of each label and prediction, -1 for one that is no class. Raises ValueError as `Confusion.of`."""
    places = {name: at for at, name in enumerate(classes)}
    unknown = [label for label in labels if label not in places]
    if not labels or len(labels) != len(predictions) or len(places) != len(classes) or unknown:
        raise ValueError(
            f"{len(labels)} labels and {len(predictions)} predictions of {len(places)} different classes among {len(classes)} have "
            f"no confusion matrix; labels that are no class: {unknown[:SHOWN]}. Give as many of both, at least one, and name "
            "each class once."
        )
    rows = np.array([places[label] for label in labels], dtype=np.int64)
    columns = np.array([-1 if prediction is None else places.get(prediction, -1) for prediction in predictions], dtype=np.int64)
    return rows, columns


def confusion_counts(labels: Counts, predictions: Counts, classes: int) -> Counts:
    """[k, k + 1] of class numbers [n] and [n]; a prediction of -1 is no class. Raises ValueError for other numbers."""
    if len(labels) and (labels.min() < 0 or labels.max() >= classes or predictions.min() < -1 or predictions.max() >= classes):
        raise ValueError(
            f"labels {labels.min()} to {labels.max()} and predictions {predictions.min()} to {predictions.max()} are no classes 0 to "
            f"{classes - 1}. A prediction that is no class is -1."
        )
    columns = np.where(predictions < 0, classes, predictions)
    return np.bincount(labels * (classes + 1) + columns, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def _notes(rows: Sequence[ClassScore], unread: int, items: int) -> list[str]:
    notes = [f"{unread} of {items} answers are none of the classes; they count as wrong"] if unread else []
    silent = [row.name for row in rows if row.support and not row.predicted]
    empty = [row.name for row in rows if row.predicted and not row.support]
    absent = [row.name for row in rows if not row.predicted and not row.support]
    if silent:
        notes.append(f"precision counts as 0 where a class is never predicted: {_named(silent)}")
    if empty:
        notes.append(f"recall counts as 0 where a class has no items: {_named(empty)}")
    if absent:
        notes.append(f"F1 counts as 0 where a class has no items and is never predicted: {_named(absent)}")
    if any(row.support == items and row.predicted == items for row in rows):
        notes.append("kappa, MCC and alpha count as 0: every label and prediction is the same class")
    elif any(row.support == items for row in rows) or any(row.predicted == items for row in rows) or unread == items:
        notes.append("MCC counts as 0: labels or predictions are all the same")
    return notes


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
