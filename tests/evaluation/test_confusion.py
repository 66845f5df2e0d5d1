"""Every score of a confusion matrix, against scikit-learn and krippendorff."""

import math
import warnings
from collections.abc import Sequence

import krippendorff
import numpy as np
import pytest
from sklearn import metrics

from megatrain.evaluation.confusion import SCORES, Confusion, confusion_counts


def sklearn_scores(labels: Sequence[int], predictions: Sequence[int], classes: int) -> dict[str, float]:
    """The same scores by others, nan for what is 0/0; class number `classes` is no class."""
    named = list(range(classes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f1 = {
            f"{kind}_f1": metrics.f1_score(labels, predictions, labels=named, average=kind, zero_division=0)
            for kind in ("micro", "macro", "weighted")
        }
        alpha = math.nan
        if len({*labels, *predictions}) > 1:
            alpha = krippendorff.alpha(np.array([labels, predictions]), level_of_measurement="nominal")
        return {
            "accuracy": metrics.accuracy_score(labels, predictions),
            **f1,
            "kappa": metrics.cohen_kappa_score(labels, predictions),
            "mcc": metrics.matthews_corrcoef(labels, predictions),
            "alpha": alpha,
        }


@pytest.mark.parametrize(
    "cases",
    [150, pytest.param(1000, marks=pytest.mark.slow)],  # scikit-learn takes most of the time
)
def test_equal_to_scikit_learn_and_krippendorff_on_random_cases(cases: int) -> None:
    rng = np.random.default_rng(0)
    undefined = 0
    for _ in range(cases):
        classes, items = int(rng.integers(1, 6)), int(rng.integers(1, 25))
        used, said = (rng.choice(classes, size=int(rng.integers(1, classes + 1)), replace=False) for _ in range(2))
        labels = rng.choice(used, size=items)
        right = rng.random(items) < rng.choice([0.0, 0.5, 0.9, 1.0])
        predictions = np.where(right, labels, rng.choice([*said, classes], size=items))
        counts = confusion_counts(labels, np.where(predictions == classes, -1, predictions), classes)
        report = Confusion(tuple(map(str, range(classes))), counts).report()
        wanted = sklearn_scores(labels.tolist(), predictions.tolist(), classes)
        undefined += any(math.isnan(score) for score in wanted.values())
        assert report.scores == pytest.approx(
            {name: 0.0 if math.isnan(score) else score for name, score in wanted.items()}, abs=1e-12
        )
        each = metrics.precision_recall_fscore_support(
            labels, predictions, labels=list(range(classes)), average=None, zero_division=0
        )
        rows = np.array([(row.precision, row.recall, row.f1, row.support) for row in report.classes]).T
        assert np.abs(rows - np.array(each)).max() <= 1e-12
    assert cases / 50 < undefined < cases / 2


def test_report_of_a_small_matrix() -> None:
    labels = ["yes", "yes", "yes", "no", "no", "maybe"]
    report = Confusion.of(["yes", "no", "maybe", "never"], labels, ["yes", "yes", "", "no", "yes", "Unknown"]).report()
    assert (report.items, report.unread) == (6, 2)
    assert report.scores["accuracy"] == 3 / 6
    assert report.scores["micro_f1"] == pytest.approx(2 * 3 / (6 + 4), abs=1e-15)
    assert report.scores["macro_f1"] == pytest.approx((4 / 6 + 2 / 3 + 0 + 0) / 4, abs=1e-15)
    yes = report.classes[0]
    assert (yes.name, yes.precision, yes.recall, yes.support, yes.predicted) == ("yes", 2 / 3, 2 / 3, 3, 3)
    assert report.notes == (
        "2 of 6 answers are none of the classes; they count as wrong",
        "precision counts as 0 where a class is never predicted: 'maybe'",
        "F1 counts as 0 where a class has no items and is never predicted: 'never'",
    )


@pytest.mark.parametrize(
    ("labels", "predictions", "note"),
    [
        ("aa", "aa", "kappa, MCC and alpha count as 0: every label and prediction is the same class"),
        ("aa", "ab", "MCC counts as 0: labels or predictions are all the same"),
        ("ab", "bb", "MCC counts as 0: labels or predictions are all the same"),
        ("ab", "??", "MCC counts as 0: labels or predictions are all the same"),
        ("bb", "ab", "recall counts as 0 where a class has no items: 'a'"),
    ],
)
def test_notes(labels: str, predictions: str, note: str) -> None:
    assert note in Confusion.of("ab", list(labels), list(predictions)).report().notes


def test_long_lists_of_classes_are_cut_in_notes() -> None:
    classes = [f"c{number}" for number in range(9)]
    (note,) = Confusion.of(classes, ["c0", "c1"], ["c0", "c1"]).report().notes
    assert note.endswith("'c2', 'c3', 'c4', 'c5', 'c6' and 2 more")


def test_many_matrices_at_once() -> None:
    one, two = (Confusion.of("ab", list("aabb"), list(said)) for said in ("abbb", "aab?"))
    stacked = type(one.margins)(
        *(np.stack((getattr(one.margins, part), getattr(two.margins, part))) for part in ("hits", "support", "predicted"))
    )
    for name, score in SCORES.items():
        assert score(stacked).tolist() == [one.report().scores[name], two.report().scores[name]]


@pytest.mark.parametrize(
    ("classes", "labels", "predictions", "words"),
    [
        (["a"], [], [], "0 labels and 0 predictions"),
        (["a"], ["a"], [], "1 labels and 0 predictions"),
        (["a", "a"], ["a"], ["a"], "1 different classes among 2"),
        (["a"], ["b"], ["a"], r"no class: \['b'\]"),
    ],
)
def test_what_has_no_matrix(classes: list[str], labels: list[str], predictions: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Confusion.of(classes, labels, predictions)


def test_numbers_that_are_no_classes() -> None:
    with pytest.raises(ValueError, match=r"labels 0 to 2 .* are no classes 0 to 1"):
        confusion_counts(np.array([0, 2]), np.array([-1, 1]), 2)
