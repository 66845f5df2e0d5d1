"""Simulations with fixed seeds: how often 95% intervals hold the truth, and how often two equal models are told apart."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from megatrain.evaluation.class_intervals import class_estimates, macro_estimate
from megatrain.evaluation.comparison import PairedDifference, compare_means, compare_proportions, compare_sums
from megatrain.evaluation.confusion import SCORES, Confusion
from megatrain.evaluation.intervals import Estimate, Floats, macro_average, mean, proportion, ratio
from megatrain.evaluation.resampling import jackknife_estimate
from megatrain.evaluation.translation_scores import score_of

Draw = Callable[[np.random.Generator, int], Estimate]
Pair = Callable[[np.random.Generator, int], PairedDifference]
SLOW = pytest.mark.slow  # a simulation of some minutes, whose cheap form runs always
NAMES = "abcdefghij"


def population(prior: list[float], right: list[float], unread: float = 0.02) -> Floats:
    """[k, k + 1] probabilities of label and answer: right, no class, or else any other class alike."""
    size = len(prior)
    cells = np.zeros((size, size + 1))
    for at, (weight, share) in enumerate(zip(prior, right, strict=True)):
        cells[at, :size] = weight * (1 - share - unread) / (size - 1)
        cells[at, at], cells[at, size] = weight * share, weight * unread
    return cells


EVEN = population([0.25] * 4, [0.6] * 4)
UNEVEN = population([0.7, 0.2, 0.1], [0.9, 0.6, 0.4])
GOOD = population([0.5, 0.5], [0.95, 0.95])


def classes(cells: Floats, score: str) -> tuple[Draw, float]:
    def draw(rng: np.random.Generator, items: int) -> Estimate:
        counts = rng.multinomial(items, cells.ravel()).reshape(cells.shape)
        confusion = Confusion(tuple(NAMES[: len(cells)]), counts)
        return macro_estimate(confusion) if score == "macro_f1" else class_estimates(confusion, 200)[score]

    truth = Confusion(tuple(NAMES[: len(cells)]), np.rint(cells * 1e9).astype(np.int64))
    return draw, float(SCORES[score](truth.margins))


def scores_within_bounds(zeros: float, ones: float) -> tuple[Draw, float]:
    def draw(rng: np.random.Generator, items: int) -> Estimate:
        kind = rng.random(items)
        return mean(np.where(kind < zeros, 0.0, np.where(kind < zeros + ones, 1.0, rng.beta(2, 2, items))))

    return draw, ones + 0.5 * (1 - zeros - ones)


def passages(rng: np.random.Generator, items: int) -> Estimate:
    """Questions about passages, some 5 each, of which some are harder."""
    passage = rng.integers(0, items, size=5 * items)
    ease = rng.beta(2, 1, items)
    return mean((rng.random(5 * items) < ease[passage]).astype(float), clusters=passage.tolist())


def documents(rng: np.random.Generator, items: int) -> Estimate:
    """Loss a byte of documents of 1/5 to 5 times the usual length."""
    size = np.rint(np.exp(rng.normal(6.0, 0.8, items)))
    return ratio(size * rng.gamma(10.0, 0.1, items), size)


def shares(rng: np.random.Generator, items: int) -> Estimate:
    return macro_average([proportion(int(rng.binomial(items, share)), items) for share in (0.2, 0.5, 0.9, 0.97)])


def ngrams(rng: np.random.Generator, length: Floats, quality: float) -> Floats:
    """[n, 10] statistics of BLEU of answers of a quality that varies."""
    items = len(length)
    word = np.clip(rng.normal(quality, 0.15, items), 0.02, 0.98)
    total = [np.maximum(0, length - less) for less in range(4)]
    matches = [rng.binomial(total[less].astype(int), word ** (1 + 0.6 * less)) for less in range(4)]
    wanted = np.maximum(1, np.rint(length * np.exp(rng.normal(0.03, 0.2, items))))
    return np.stack([length, wanted, *matches, *total], axis=1).astype(float)


def lengths(rng: np.random.Generator, items: int) -> Floats:
    return np.maximum(1.0, np.rint(np.exp(rng.normal(2.8, 0.6, items))))


def translations(quality: float) -> tuple[Draw, float]:
    rng = np.random.default_rng(99)
    pool = ngrams(rng, lengths(rng, 200_000), quality)
    score = score_of("bleu")

    def draw(rng: np.random.Generator, items: int) -> Estimate:
        drawn = pool[rng.integers(0, len(pool), items)]
        return jackknife_estimate(drawn, score, (0.0, 100.0))

    return draw, float(score(pool.sum(axis=0)[None])[0])


KINDS: dict[str, Callable[[], tuple[Draw, float]]] = {
    "scores": lambda: scores_within_bounds(0.3, 0.4),
    "scores nearly 0": lambda: scores_within_bounds(0.9, 0.02),
    "scores nearly 1": lambda: scores_within_bounds(0.02, 0.9),
    "clustered": lambda: (passages, 2 / 3),
    "bits per byte": lambda: (documents, 1.0),
    "macro average": lambda: (shares, (0.2 + 0.5 + 0.9 + 0.97) / 4),
    "macro F1": lambda: classes(EVEN, "macro_f1"),
    "macro F1 uneven": lambda: classes(UNEVEN, "macro_f1"),
    "macro F1 good": lambda: classes(GOOD, "macro_f1"),
    "weighted F1": lambda: classes(UNEVEN, "weighted_f1"),
    "micro F1": lambda: classes(EVEN, "micro_f1"),
    "kappa": lambda: classes(UNEVEN, "kappa"),
    "kappa good": lambda: classes(GOOD, "kappa"),
    "MCC": lambda: classes(EVEN, "mcc"),
    "alpha": lambda: classes(EVEN, "alpha"),
    "BLEU": lambda: translations(0.6),
    "BLEU low": lambda: translations(0.35),
}


def coverage(kind: str, items: int, times: int) -> float:
    draw, truth = KINDS[kind]()
    rng = np.random.default_rng([1, items, *kind.encode()])
    found = [draw(rng, items) for _ in range(times)]
    return sum(one.low <= truth <= one.high for one in found) / times


@pytest.mark.parametrize(("items", "least", "most"), [(50, 0.931, 0.978), (200, 0.934, 0.968), (2000, 0.944, 0.956)])
def test_coverage_of_proportions_exactly(items: int, least: float, most: float) -> None:
    """Over shares of 5 to 95%, of which each has its own coverage, as there are only so many numbers of right items."""
    right = np.arange(items + 1)
    ends = np.array([(found.low, found.high) for found in (proportion(number, items) for number in right.tolist())])
    covered = [
        float(stats.binom.pmf(right, items, share) @ ((ends[:, 0] <= share) & (share <= ends[:, 1])))
        for share in np.arange(0.05, 0.951, 0.005)
    ]
    assert 0.949 < np.mean(covered) < 0.952
    assert least < min(covered) < max(covered) < most


@SLOW
@pytest.mark.parametrize("items", [50, 200, 2000])
@pytest.mark.parametrize("kind", KINDS)
def test_coverage_is_93_to_97_percent(kind: str, items: int) -> None:
    """The standard error of a simulation of 2,000 is 0.5%."""
    assert 0.925 <= coverage(kind, items, 2000) <= 0.975


@pytest.mark.parametrize("kind", ["scores nearly 0", "clustered", "bits per byte", "macro F1", "kappa", "BLEU low"])
def test_coverage_at_50_items(kind: str) -> None:
    """A cheap form, whose standard error is 1.5%: it finds an interval of the bootstrap's percentiles or of the wrong spread."""
    assert 0.91 <= coverage(kind, 50, 200) <= 0.99


def right_or_wrong(differing: float) -> Pair:
    def draw(rng: np.random.Generator, items: int) -> PairedDifference:
        differs, who, both = rng.random(items) < differing, rng.random(items) < 0.5, rng.random(items) < 0.6
        return compare_proportions(np.where(differs, who, both).tolist(), np.where(differs, ~who, both).tolist())

    return draw


def f1_scores(same: float) -> Pair:
    """Scores of two models that find the same items hard, most of them equal."""

    def draw(rng: np.random.Generator, items: int) -> PairedDifference:
        first, second = (np.rint(4 * rng.beta(0.5, 0.5, items)) / 4 for _ in range(2))
        return compare_means(first, np.where(rng.random(items) < same, first, second))

    return draw


def two_translators(same: float) -> Pair:
    def draw(rng: np.random.Generator, items: int) -> PairedDifference:
        long = lengths(rng, items)
        first, second = ngrams(rng, long, 0.5), ngrams(rng, long, 0.5)
        second[:, 1] = first[:, 1]
        second = np.where(rng.random(items)[:, None] < same, first, second)
        return compare_sums(first, second, score_of("bleu"), resamples=50)

    return draw


PAIRS: dict[str, Pair] = {
    "right or wrong": right_or_wrong(0.3),
    "right or wrong, nearly equal": right_or_wrong(0.03),
    "scores": f1_scores(0.0),
    "scores, nearly equal": f1_scores(0.95),
    "BLEU": two_translators(0.0),
    "BLEU, nearly equal": two_translators(0.95),
}


def alarms(pair: str, items: int, times: int) -> float:
    rng = np.random.default_rng([items, *pair.encode()])
    return sum(PAIRS[pair](rng, items).seen for _ in range(times)) / times


@SLOW
@pytest.mark.parametrize("items", [50, 200, 2000])
@pytest.mark.parametrize("pair", PAIRS)
def test_false_alarms_are_under_6_percent(pair: str, items: int) -> None:
    assert alarms(pair, items, 2000) < 0.06


@pytest.mark.parametrize("pair", PAIRS)
def test_false_alarms_at_50_items(pair: str) -> None:
    """A cheap form, whose standard error is 1.5%."""
    assert alarms(pair, 50, 200) < 0.09


def test_the_smallest_difference_is_seen_four_times_in_five() -> None:
    rng = np.random.default_rng(4)
    seen, least = 0, compare_means(*_shifted(rng, 0.0)).detectable
    for _ in range(500):
        seen += compare_means(*_shifted(rng, least)).seen
    assert 0.72 < seen / 500 < 0.88


def _shifted(rng: np.random.Generator, by: float) -> tuple[Floats, Floats]:
    first = rng.random(200)
    return first, first + rng.normal(by, 0.3, 200)
