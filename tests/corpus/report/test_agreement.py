"""Measures of agreement equal those of scikit-learn and krippendorff, and the examples of the papers."""

import math

import krippendorff
import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from megatrain.corpus.report import agreement
from megatrain.corpus.report.agreement import (
    MISSING,
    cohen_kappa,
    confusion,
    disagreements,
    fleiss_kappa,
    krippendorff_alpha,
    majorities,
    percent_agreement,
)

M = MISSING
# The example of Krippendorff (2011), part C: 4 observers, 12 units, 5 labels, missing ones.
PAPER = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, M, M, M],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, M, 3],
        [M, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, M],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, M],
    ]
).T
PAPER_CODES = np.where(PAPER == M, M, PAPER - 1)
# Fleiss' kappa, the table of 10 subjects and 14 raters that textbooks print: 0.210.
COUNTS = [(0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1)]
COUNTS += [(7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7)]
SUBJECTS = np.array([np.repeat(np.arange(5), row) for row in COUNTS])


def random_labels(seed, missing):
    """Labels of some raters who mostly agree."""
    rng = np.random.default_rng(seed)
    items, raters, labels = int(rng.integers(2, 40)), int(rng.integers(2, 6)), int(rng.integers(2, 6))
    truth = rng.integers(0, labels, (items, 1))
    codes = np.where(rng.random((items, raters)) < 0.6, truth, rng.integers(0, labels, (items, raters)))
    return np.where(rng.random((items, raters)) < missing, M, codes), np.sort(rng.choice(50, labels, replace=False)) / 4.0


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorffs_own_example(level, alpha):
    assert round(krippendorff_alpha(PAPER_CODES, np.arange(1.0, 6.0), level), 3) == alpha


@pytest.mark.parametrize("cells", [agreement.CELLS, 7])
@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_alpha_equals_the_librarys(level, cells, monkeypatch):
    """Whether items are counted together or a few at a time."""
    monkeypatch.setattr(agreement, "CELLS", cells)
    compared = 0
    for seed in range(60):
        codes, values = random_labels(seed, missing=0.25 * (seed % 3))
        given = np.where(codes == M, np.nan, values[codes])
        if len(set(codes[(codes != M).sum(axis=1) > 1].ravel().tolist()) - {M}) < 2:
            continue
        theirs = krippendorff.alpha(reliability_data=given.T, level_of_measurement=level, value_domain=values)
        assert krippendorff_alpha(codes, values, level) == pytest.approx(theirs, abs=1e-12)
        compared += 1
    assert compared > 50


def test_kappa_of_two_equals_the_librarys():
    for seed in range(60):
        codes, _ = random_labels(seed, missing=0.2)
        both = (codes[:, :2] != M).all(axis=1)
        if len(set(codes[both, :2].ravel().tolist())) < 2:
            continue
        theirs = cohen_kappa_score(codes[both, 0], codes[both, 1])
        assert cohen_kappa(codes[:, 0], codes[:, 1], 6) == pytest.approx(theirs, abs=1e-12)


def test_fleiss_kappa_of_the_textbook():
    kappa, raters, items = fleiss_kappa(SUBJECTS, 5)
    assert (round(kappa, 3), raters, items) == (0.210, 14, 10)


def test_fleiss_kappa_is_alpha_but_for_the_size_of_the_sample(monkeypatch):
    for seed in range(30):
        monkeypatch.setattr(agreement, "CELLS", 11 if seed % 2 else 1 << 22)
        codes, values = random_labels(seed, missing=0)
        kappa, raters, items = fleiss_kappa(codes, len(values))
        assert (raters, items) == codes.shape[::-1]
        pairable = codes.size
        alpha = 1 - (1 - kappa) * (pairable - 1) / pairable
        assert krippendorff_alpha(codes, values) == pytest.approx(alpha, abs=1e-12)


def test_fleiss_kappa_is_of_the_items_with_the_usual_number_of_labels():
    codes = np.array([[0, 0, M], [0, M, 1], [M, 1, 1], [0, 1, 1], [M, M, 0]])
    kappa, raters, items = fleiss_kappa(codes, 2)
    assert (raters, items) == (2, 3)
    assert kappa == pytest.approx(1 - (1 / 3) / (1 - 0.5**2 - 0.5**2))


@pytest.mark.parametrize("cells", [1, 6, 1 << 22])
def test_counts_by_hand(cells, monkeypatch):
    monkeypatch.setattr(agreement, "CELLS", cells)
    codes = np.array([[0, 0, M], [0, 1, 1], [2, M, M], [M, M, M], [1, 0, 2]])
    assert percent_agreement(codes, 3) == pytest.approx((1 + 1 + 0) / (1 + 3 + 3))
    assert confusion(codes[:, 0], codes[:, 1], 3).tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert majorities(codes, 3).tolist() == [0, 1, 2, M, M]
    assert disagreements(codes).tolist() == [1, 4]


def test_where_chance_cannot_disagree_there_is_no_measure():
    same, none = np.zeros((4, 2), np.int64), np.full((3, 2), M)
    for codes in (same, none, np.array([[0, M], [M, 1]])):
        assert math.isnan(cohen_kappa(codes[:, 0], codes[:, 1], 2))
        assert math.isnan(fleiss_kappa(codes, 2)[0])
        assert math.isnan(krippendorff_alpha(codes, np.arange(2.0)))
    assert percent_agreement(same, 2) == 1.0
    assert math.isnan(percent_agreement(none, 2))
