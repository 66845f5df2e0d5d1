"""Intervals of the scores of a confusion matrix: closed forms, honesty about few items, clusters, speed."""

import time

import numpy as np
import pytest

from megatrain.evaluation.class_intervals import (
    class_estimates,
    clustered_class_estimates,
    item_margins,
    macro_estimate,
    margins_of,
    per_class_estimates,
    resampled_scores,
)
from megatrain.evaluation.confusion import SCORES, Confusion, accuracy, macro_f1
from megatrain.evaluation.intervals import proportion

MATRIX = Confusion(("a", "b", "c"), np.array([[30, 5, 1, 2], [3, 20, 4, 0], [0, 6, 9, 1]]))


def test_every_score_has_an_interval_around_it() -> None:
    found, report = class_estimates(MATRIX, 2000), MATRIX.report()
    assert list(found) == list(SCORES)
    assert {name: one.value for name, one in found.items()} == report.scores
    assert all(one.low < one.value < one.high and one.units == 81 for one in found.values())
    assert found["accuracy"] == proportion(59, 81)
    assert found["weighted_f1"].stderr == pytest.approx(found["accuracy"].stderr, rel=0.1)
    assert found == class_estimates(MATRIX, 2000)
    assert found != class_estimates(MATRIX, 2000, seed=1)


def test_closed_form_of_macro_f1_agrees_with_the_bootstrap() -> None:
    counts = Confusion(MATRIX.classes, MATRIX.counts * 30)
    (draws,) = resampled_scores(counts, [macro_f1], 10_000)
    found = macro_estimate(counts)
    assert found.stderr == pytest.approx(draws.std(), rel=0.03)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=2e-3)


def test_macro_f1_is_moved_by_the_bias_of_f1() -> None:
    one = Confusion(("a",), np.array([[30, 10]]))
    found, alone = macro_estimate(one), per_class_estimates(one)["a"]["f1"]
    bias = 2 * 0.75 * 0.25 / (1.75**3 * 40)  # -J'' / 2 of 2J / (1 + J), times the variance of J = 30 / 40
    assert (found.low, found.high) == (pytest.approx(alone.low + bias, abs=1e-12), pytest.approx(alone.high + bias, abs=1e-12))


def test_the_standard_error_of_few_items_is_not_too_small() -> None:
    few = Confusion(("a", "b"), np.array([[2, 1, 0], [1, 1, 0]]))  # 3 of 5 right, so micro F1 is a mean of 5
    assert class_estimates(few)["micro_f1"].stderr == pytest.approx(np.sqrt(0.6 * 0.4 / 4), rel=0.03)


def test_scores_of_one_class() -> None:
    found = per_class_estimates(MATRIX)
    assert found["a"]["precision"] == proportion(30, 33)
    assert found["a"]["recall"] == proportion(30, 38)
    share = proportion(30, 41)
    assert found["a"]["f1"].value == 2 * 30 / (38 + 33)
    assert (found["a"]["f1"].low, found["a"]["f1"].high) == (
        pytest.approx(2 * share.low / (1 + share.low)),
        pytest.approx(2 * share.high / (1 + share.high)),
    )


def test_all_right_and_all_wrong_are_not_certain() -> None:
    right = Confusion(("a", "b"), np.array([[25, 0, 0], [0, 25, 0]]))
    for name, one in class_estimates(right).items():
        assert (one.value, one.high) == (1.0, 1.0)
        assert 0.75 < one.low < 0.95, name
    assert macro_estimate(right).low == pytest.approx(proportion(50, 50).low, abs=0.03)
    wrong = Confusion(("a", "b"), np.array([[0, 25, 0], [0, 0, 25]]))
    for name in ("accuracy", "macro_f1", "micro_f1", "weighted_f1"):
        one = class_estimates(wrong)[name]
        assert (one.value, one.low) == (0.0, 0.0)
        assert 0.05 < one.high < 0.2, name


def test_a_class_that_does_not_occur_may_be_anything() -> None:
    absent = Confusion(("a", "b", "c"), np.array([[20, 5, 0, 0], [5, 20, 0, 0], [0, 0, 0, 0]]))
    assert [(one.value, one.low, one.high) for one in per_class_estimates(absent)["c"].values()] == [(0.0, 0.0, 1.0)] * 3
    assert macro_estimate(absent).high > macro_estimate(absent).value + 1 / 3


def test_one_item() -> None:
    found = class_estimates(Confusion(("a", "b"), np.array([[1, 0, 0], [0, 0, 0]])))
    assert all(0.0 <= one.value <= 1.0 and one.low < one.high for one in found.values())
    assert (found["accuracy"].low, found["accuracy"].high) == (pytest.approx(0.2065, abs=1e-4), 1.0)


def test_clusters_widen() -> None:
    labels, predictions = list("aaabbb" * 20), (list("aaabbb") + list("bbbaa?")) * 10
    confusion = Confusion.of("ab", labels, predictions)
    alone = class_estimates(confusion)
    together = clustered_class_estimates(confusion, labels, predictions, clusters=[at // 6 for at in range(120)])
    assert {name: one.value for name, one in together.items()} == pytest.approx(
        {name: one.value for name, one in alone.items()}
    )
    assert all(one.units == 20 for one in together.values())
    assert all(one.high - one.low > 1.5 * (alone[name].high - alone[name].low) for name, one in together.items())


def test_items_add_up_to_the_matrix() -> None:
    labels, predictions = list("abca"), ["a", None, "b", "?"]
    confusion = Confusion.of("abc", labels, predictions)
    margins = margins_of(item_margins(confusion.classes, labels, predictions).sum(axis=0))
    for part in ("hits", "support", "predicted"):
        assert getattr(margins, part).tolist() == getattr(confusion.margins, part).tolist()


@pytest.mark.alone
def test_ten_thousand_resamples_are_fast() -> None:
    counts = Confusion(MATRIX.classes, MATRIX.counts * 25)  # 2,025 items
    fastest = 1.0
    for _ in range(3):
        began = time.perf_counter()
        macro, exact = resampled_scores(counts, [macro_f1, accuracy], 10_000)
        fastest = min(fastest, time.perf_counter() - began)
    assert fastest < 0.1
    assert (len(macro), len(exact)) == (10_000, 10_000)
