"""How far several raters agree: percent agreement, Cohen's and Fleiss' kappa, Krippendorff's alpha.

A set of labels is an array [items, raters] of codes 0 .. k-1, and -1 where a rater gave none. All measures are

    1 - observed disagreement / disagreement expected by chance

and differ in what chance is: Cohen (1960) takes each rater's own shares of labels, Fleiss (1971) those of all raters together,
Krippendorff (2011, "Computing Krippendorff's Alpha-Reliability") those of all pairable labels, drawn without putting back; alpha alone
takes missing labels, and distances between labels. A measure is NaN where chance never disagrees, such as when all labels are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Level = Literal["nominal", "ordinal", "interval"]
MISSING = -1
CELLS = 1 << 22
"""Cells of a table of items and labels that is in memory at a time."""


def blocks(codes: Codes, labels: int) -> Iterator[Floats]:
    """[items, k] how many raters gave each label, for some items at a time, so that many items and labels fit into memory."""
    step = max(1, CELLS // max(1, labels))
    for start in range(0, len(codes), step):
        block = codes[start : start + step]
        rows, columns = np.nonzero(block != MISSING)
        flat = np.bincount(rows * labels + block[rows, columns], minlength=len(block) * labels)
        yield flat.reshape(len(block), labels).astype(np.float64)


def coincidences(codes: Codes, labels: int) -> Floats:
    """[k, k] how often two labels meet in an item: each ordered pair of raters weighs 1 / (labels of the item - 1)."""
    total: Floats = np.zeros((labels, labels))
    for counts in blocks(codes[_given(codes) > 1], labels):
        weighted = counts / (counts.sum(axis=1) - 1)[:, None]
        total += weighted.T @ counts - np.diag(weighted.sum(axis=0))
    return total


def percent_agreement(codes: Codes, labels: int) -> float:
    """Share of agreeing pairs among all pairs of labels of one item; NaN without pairs."""
    given = _given(codes)
    pairs = int((given * (given - 1)).sum())
    agreeing = sum(float((counts * (counts - 1)).sum()) for counts in blocks(codes, labels))
    return agreeing / pairs if pairs else float("nan")


def _given(codes: Codes) -> Codes:
    """[items] number of labels."""
    return np.asarray((codes != MISSING).sum(axis=1), np.int64)


def confusion(first: Codes, second: Codes, labels: int) -> Floats:
    """[k, k] items by the first rater's label (rows) and the second's, of those that both labelled."""
    both = (first != MISSING) & (second != MISSING)
    flat = np.bincount(first[both] * labels + second[both], minlength=labels * labels)
    return flat.reshape(labels, labels).astype(np.float64)


def cohen_kappa(first: Codes, second: Codes, labels: int) -> float:
    """Cohen's kappa of two raters, on the items that both labelled."""
    seen = confusion(first, second, labels)
    total = seen.sum()
    expected = float(total - (seen.sum(axis=0) @ seen.sum(axis=1)) / total) if total else 0.0
    return 1.0 - float(total - np.trace(seen)) / expected if expected else float("nan")


def fleiss_kappa(codes: Codes, labels: int) -> tuple[float, int, int]:
    """Fleiss' kappa, the labels an item and the number of items that it is of.

    It is defined for one number of labels an item, whoever gave them: the most frequent one above 1, the larger one of two.
    """
    given = _given(codes)
    often = np.bincount(given, minlength=2)
    often[:2] = 0
    if not often.any():
        return float("nan"), 0, 0
    raters = int(len(often) - 1 - np.argmax(often[::-1]))
    shares, agreeing, items = np.zeros(labels), 0.0, int(often[raters])
    for counts in blocks(codes[given == raters], labels):
        shares += counts.sum(axis=0)
        agreeing += float((counts * (counts - 1)).sum())
    shares /= items * raters
    observed = 1.0 - agreeing / (items * raters * (raters - 1))
    expected = 1.0 - float(shares @ shares)
    kappa = 1.0 - observed / expected if np.count_nonzero(shares) > 1 else float("nan")
    return kappa, raters, items


def krippendorff_alpha(codes: Codes, values: Floats, level: Level = "nominal") -> float:
    """Krippendorff's alpha. values: [k] of the labels, rising; they matter at the level `interval`, their order at `ordinal`."""
    seen = coincidences(codes, len(values))
    margins = seen.sum(axis=1)
    distance = _distances(margins, values, level)
    total = float(margins.sum())
    expected = float(margins @ distance @ margins)
    return 1.0 - (total - 1.0) * float((seen * distance).sum()) / expected if expected else float("nan")


def _distances(margins: Floats, values: Floats, level: Level) -> Floats:
    """[k, k] squared distances of labels."""
    if level == "nominal":
        return 1.0 - np.eye(len(values))
    # Ordinal: a label lies in the middle of its own occurrences among all, put in order.
    at = np.cumsum(margins) - margins / 2 if level == "ordinal" else values
    return np.asarray((at[:, None] - at[None, :]) ** 2)


def majorities(codes: Codes, labels: int) -> Codes:
    """[items] the label of most raters; MISSING where two labels tie, or without labels."""
    found = [np.zeros(0, np.int64)]
    for counts in blocks(codes, labels):
        most = counts.max(axis=1, initial=0)
        unique = (counts == most[:, None]).sum(axis=1) == 1
        found.append(np.where(unique & (most > 0), counts.argmax(axis=1), MISSING))
    return np.concatenate(found)


def disagreements(codes: Codes) -> Codes:
    """The items to which raters gave different labels."""
    low = np.where(codes == MISSING, np.iinfo(np.int64).max, codes).min(axis=1)
    return np.flatnonzero((codes.max(axis=1) != MISSING) & (low != codes.max(axis=1)))
