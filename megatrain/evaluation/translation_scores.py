"""BLEU and chrF of a corpus, through sacrebleu (extra [eval]; Post 2018, arXiv:1804.08771), which cuts texts and counts n-grams.

What it counts of each item is kept, for a corpus's score is a function of the sums: resamples need no texts. BLEU's default way of cutting
text, 13a, takes a Chinese sentence for one word, so that equal sentences score 0; so the way follows the references: `zh` where one
of them is mostly Han, `char` where kana is among its letters, 13a else (`zh` cuts other text as 13a does).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatrain.evaluation.intervals import Estimate, Floats
from megatrain.evaluation.resampling import SumScore, jackknife_estimate
from megatrain.evaluation.text_scores import mostly_without_blanks

Metric = Literal["bleu", "chrf"]
ORDERS = {"bleu": 4, "chrf": 6}
"""Longest n-gram, in words and in characters."""
_KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa]")


@dataclass(frozen=True, eq=False)
class CorpusScore:
    """A corpus's BLEU or chrF, 0 to 100."""

    metric: Metric
    score: float
    signature: str
    """All that another needs to get the same number, as sacrebleu prints it."""
    statistics: Floats
    """[n, k] counts of each item, whose sums give the score (`score_of`)."""

    def estimate(self, clusters: Sequence[Hashable] | None = None) -> Estimate:
        """The score with its interval, for items or clusters of them that are independent (`jackknife_estimate`)."""
        return jackknife_estimate(self.statistics, score_of(self.metric), (0.0, 100.0), clusters)


def corpus_bleu(answers: Sequence[str], references: Sequence[Sequence[str]], tokenize: str | None = None) -> CorpusScore:
    """BLEU of answers [n] to references [n][any number >= 1]; tokenize: sacrebleu's name of a way to cut text, chosen by the text if None.

    Raises ImportError without sacrebleu, ValueError for no items, items without references and an unknown way.
    """
    package = _sacrebleu()
    way = chosen_tokenizer(references) if tokenize is None else tokenize
    if way not in package.BLEU.TOKENIZERS:
        raise ValueError(f"sacrebleu has no tokenizer {way!r}. Use one of {', '.join(sorted(package.BLEU.TOKENIZERS))}.")
    return _scored("bleu", package.BLEU(tokenize=way), answers, references)


def corpus_chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> CorpusScore:
    """chrF (character n-grams up to 6, beta 2; Popović 2015). Errors as `corpus_bleu`."""
    return _scored("chrf", _sacrebleu().CHRF(), answers, references)


def chosen_tokenizer(references: Sequence[Sequence[str]]) -> str:
    """The way of cutting text for BLEU."""
    dense = [text for texts in references for text in texts if mostly_without_blanks(text)]
    if any(_KANA.search(text) for text in dense):
        return "char"
    return "zh" if dense else "13a"


def _sacrebleu() -> Any:
    try:
        return importlib.import_module("sacrebleu")
    except ImportError:
        raise ImportError("BLEU and chrF need sacrebleu: pip install 'megatrain[eval]'") from None


def _scored(metric: Metric, made: Any, answers: Sequence[str], references: Sequence[Sequence[str]]) -> CorpusScore:
    empty = [at for at, texts in enumerate(references) if isinstance(texts, str) or not texts]
    if not answers or len(answers) != len(references) or empty:
        raise ValueError(
            f"{len(answers)} answers and {len(references)} lists of references, {len(empty)} of them empty (items {empty[:5]}), have "
            f"no {metric}. Give as many of both, at least one, and a reference for each answer."
        )
    longest = max(map(len, references))
    columns = [[texts[at] if at < len(texts) else None for texts in references] for at in range(longest)]
    statistics = np.array(made._extract_corpus_statistics(list(answers), columns), dtype=np.float64)
    score = float(score_of(metric)(statistics.sum(axis=0)[None])[0])
    return CorpusScore(metric, score, str(made.get_signature()), statistics)


def score_of(metric: Metric) -> SumScore:
    """The score [b] of sums of statistics [b, k]."""
    return _bleu if metric == "bleu" else _chrf


def _bleu(sums: Floats) -> Floats:
    """BLEU [b] of sums [b, 10]: length of answers, of references, matching n-grams (1 to 4), all n-grams. As sacrebleu with its defaults.

    Orders without a match count 1 / 2^j matches, j the number of such orders so far (NIST's smoothing); an order without n-grams, or no
    match at all, makes 0.
    """
    order = ORDERS["bleu"]
    given, wanted, matches, total = sums[:, 0], sums[:, 1], sums[:, 2 : 2 + order], sums[:, 2 + order :]
    usable = (matches.max(axis=1) > 0.0) & (total.min(axis=1) > 0.0)
    none = (matches == 0.0) & (total > 0.0)
    smoothed = np.where(none, 0.5 ** np.cumsum(none, axis=1), matches)
    precision = np.divide(smoothed, total, out=np.ones_like(total), where=usable[:, None])
    brevity = 1.0 - np.divide(wanted, given, out=np.ones_like(given), where=given > 0.0)
    return np.where(usable, 100.0 * np.exp(np.minimum(0.0, brevity) + np.log(precision).mean(axis=1)), 0.0)


def _chrf(sums: Floats) -> Floats:
    """chrF [b] of sums [b, 18]: n-grams of the answer, of the reference and matching, for each order; means are over orders of both."""
    given, wanted, matches = (sums[:, part::3] for part in range(3))
    used = (given > 0.0) & (wanted > 0.0)
    orders = np.maximum(1, used.sum(axis=1))
    precision = np.divide(matches, given, out=np.zeros_like(given), where=used).sum(axis=1) / orders
    recall = np.divide(matches, wanted, out=np.zeros_like(given), where=used).sum(axis=1) / orders
    return np.divide(
        500.0 * precision * recall, 4.0 * precision + recall, out=np.zeros(len(sums)), where=precision + recall > 0.0
    )
