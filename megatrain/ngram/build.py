"""Turns the n-grams of an ARPA file into the tables of a model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatrain.ngram.arpa_in import Arpa, Section
from megatrain.ngram.model import HeldWords, NgramModel, Order
from megatrain.ngram.table import MISSING, Slots, Table, TwiceError

Numbers = npt.NDArray[np.uint32]


def model_of(arpa: Arpa) -> NgramModel:
    """The model of an ARPA file. Suffixes that a pruned model lacks are added, with the probabilities that backing off gives them.

    Raises ArpaError.
    """
    words = HeldWords(arpa.words)
    unigrams = arpa.sections[0]
    orders = [Order(None, unigrams.log10, unigrams.backoff if len(arpa.sections) > 1 else np.zeros(0, np.float32))]
    for k in range(2, len(arpa.sections) + 1):
        section = arpa.sections[k - 1]
        lacking = _lacking(orders, section.words)
        while lacking is not None:
            _add_suffixes(arpa, orders, lacking)
            orders = orders[: lacking.shape[1] - 1]
            for again in range(lacking.shape[1], k):
                orders.append(_order(orders, arpa, again))
            lacking = _lacking(orders, section.words)
        orders.append(_order(orders, arpa, k))
    return NgramModel(orders, words)


def _nodes(orders: list[Order], words: Numbers, length: int) -> Slots:
    """For each row of words [n, k]: the slot of the n-gram of its last `length` words; MISSING if there is none."""
    node = words[:, -1]
    for j in range(2, length + 1):
        table = orders[j - 1].table
        keys = node.astype(np.uint64) << np.uint64(32) | words[:, -j]
        found = np.full(node.size, MISSING) if table is None else table.find(keys)
        node = np.where(node == MISSING, MISSING, found).astype(np.uint32)
    return node


def _lacking(orders: list[Order], words: Numbers) -> Numbers | None:
    """The lowest-order suffixes of the rows that are missing, [m, length]; None if all are present."""
    for length in range(2, words.shape[1]):
        lost = _nodes(orders, words, length) == MISSING
        if lost.any():
            return np.unique(words[lost, -length:], axis=0)
    return None


def _add_suffixes(arpa: Arpa, orders: list[Order], rows: Numbers) -> None:
    """Add the n-grams `rows` [n, k] to their section, with the probabilities that lower orders give them."""
    k = rows.shape[1]
    ends = np.zeros(rows.size, bool)
    ends[k - 1 :: k] = True
    nothing = np.zeros(0, np.float32)
    below = NgramModel([*orders[: k - 1], Order(None, nothing, nothing)], HeldWords(arpa.words))
    log10 = below.log10(rows.ravel(), ends, bos=False)[ends]
    section = arpa.sections[k - 1]
    arpa.sections[k - 1] = Section(
        np.concatenate([section.words, rows]),
        np.concatenate([section.log10, log10.astype(np.float32)]),
        np.concatenate([section.backoff, np.zeros(len(rows), np.float32)]),
        section.line,
    )


def _order(orders: list[Order], arpa: Arpa, k: int) -> Order:
    """Order k, whose suffixes are all present. Raises ArpaError for an n-gram that occurs twice."""
    section = arpa.sections[k - 1]
    node = _nodes(orders, section.words, k - 1)
    try:
        table, slots = Table.of(node.astype(np.uint64) << np.uint64(32) | section.words[:, 0])
    except TwiceError as error:
        raise arpa.twice(k, *error.places) from None
    has_backoff = k < len(arpa.sections)
    log10, backoff = np.zeros(table.keys.size, np.float32), np.zeros(table.keys.size if has_backoff else 0, np.float32)
    log10[slots] = section.log10
    if has_backoff:
        backoff[slots] = section.backoff
    return Order(table, log10, backoff)
