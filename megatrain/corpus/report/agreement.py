"""How far several raters agree: percent agreement, Cohen's and Fleiss' kappa, Krippendorff's alpha.

A set of labels is an array [items, raters] of codes 0 .. k-1, and -1 where a rater gave none. All measures are

    1 - observed disagreement / disagreement expected by chance

and differ in what chance is: Cohen (1960) takes each rater's own shares of labels, Fleiss (1971) those of all raters together,
Krippendorff (2011, "Computing Krippendorff's Alpha-Reliability") those of all pairable labels, drawn without putting back; alpha alone
takes missing labels, and distances between labels. A measure is NaN where chance never disagrees, such as when all labels are the same.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Level = Literal["nominal", "ordinal", "interval"]
MISSING = -1


def coincidences(codes: Codes, labels: int) -> Floats:
    """[k, k] how often two labels meet in an item: each ordered pair of raters weighs 1 / (labels of the item - 1)."""
    counts = per_item(codes, labels)
    together = counts.sum(axis=1)
    counts, together = counts[together > 1], together[together > 1]
    weighted = counts / (together - 1)[:, None]
    return np.asarray(weighted.T @ counts - np.diag(weighted.sum(axis=0)))


def per_item(codes: Codes, labels: int) -> Floats:
    """[items, k] how many raters gave each label."""
    rows, columns = np.nonzero(codes != MISSING)
    flat = np.bincount(rows * labels + codes[rows, columns], minlength=len(codes) * labels)
    return flat.reshape(len(codes), labels).astype(np.float64)


def percent_agreement(codes: Codes, labels: int) -> float:
    """Share of agreeing pairs among all pairs of labels of one item; NaN without pairs."""
    counts = per_item(codes, labels)
    together = counts.sum(axis=1)
    pairs = float((together * (together - 1)).sum())
    return float((counts * (counts - 1)).sum()) / pairs if pairs else float("nan")


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
    counts = per_item(codes, labels)
    together = counts.sum(axis=1).astype(np.int64)
    often = np.bincount(together, minlength=2)
    often[:2] = 0
    if not often.any():
        return float("nan"), 0, 0
    raters = int(len(often) - 1 - np.argmax(often[::-1]))
    counts = counts[together == raters]
    shares = counts.sum(axis=0) / counts.sum()
    observed = 1.0 - float((counts * (counts - 1)).sum()) / (len(counts) * raters * (raters - 1))
    expected = 1.0 - float(shares @ shares)
    kappa = 1.0 - observed / expected if np.count_nonzero(shares) > 1 else float("nan")
    return kappa, raters, len(counts)


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
    counts = per_item(codes, labels)
    most = counts.max(axis=1, initial=0)
    unique = (counts == most[:, None]).sum(axis=1) == 1
    return np.where(unique & (most > 0), counts.argmax(axis=1) if labels else MISSING, MISSING)


def disagreements(codes: Codes) -> Codes:
    """The items to which raters gave different labels."""
    low = np.where(codes == MISSING, np.iinfo(np.int64).max, codes).min(axis=1)
    return np.flatnonzero((codes.max(axis=1) != MISSING) & (low != codes.max(axis=1)))
