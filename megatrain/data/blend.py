"""Weighted blends: the corpus that sample n comes from, and the sample's number there, without counting up to n.

Two corpora are easy: after n samples the first has given round(w n), the other the rest, and neither is ever more than half a
sample away from its share. More corpora are split in two groups by the same rule, and each group again:

              n samples                  weights 0.5, 0.3, 0.2
             /         \\
       round(0.5 n)     r = n - round(0.5 n)
        corpus 0        /            \\
                  round(0.6 r)       the rest
                   corpus 1          corpus 2

Each answer is a walk down this tree in exact integer arithmetic: a pure function of n, with nothing to store and no drift.

Error bound. Let e be the error of a group of weight w (its count minus its share). A part of weight v = r w gets round(r *
count), so its error is r e plus at most 1/2 from rounding. Summed down the tree a corpus is off by at most 1/2 + r (1/2 + r'
(1/2 + ...)), which `Blend.bound` gives for the actual weights: 1/2 for two corpora, and less than 1 for three and four,
whose tree has two levels. For any number of corpora it is less than 2: a set can always be split so that each part of more than
one corpus has at most 2/3 of the weight (the heaviest corpus alone if it has a third or more; otherwise corpora are moved over,
one by one, until their part has a third), so a group is off by less than 1/2 (1 + 2/3 + 4/9 + ...) = 3/2, and a corpus by
less than 1/2 + 3/2. (A bound of 1 for any number is possible, Tijdeman, Discrete Mathematics 32 (1980) 323, but only by stepping
through all n.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import isfinite, lcm

from megatrain.config.pieces import as_written


@dataclass(frozen=True)
class _Node:
    """A group of corpora split in two: `share` / `total` of its samples go to the left part."""

    left: _Node | int
    right: _Node | int
    share: int
    total: int

    def left_count(self, n: int) -> int:
        """Number of the first n samples of this group that go left: share / total * n, rounded half up."""
        return (2 * self.share * n + self.total) // (2 * self.total)


class Blend:
    """Deals samples to corpora in proportion to `weights` (any positive numbers, a float as it is written; only their ratios matter).

    Raises ValueError for an empty list or a weight that is not a positive, finite number.
    """

    def __init__(self, weights: Sequence[float | Fraction]) -> None:
        if not weights:
            raise ValueError("A blend needs at least one corpus: list one under data.train.")
        for i, weight in enumerate(weights):
            if not (isfinite(weight) and weight > 0):
                raise ValueError(
                    f"Corpus {i} of the blend has weight {weight}; it must be greater than 0. To leave it out, remove it."
                )
        exact = [w if isinstance(w, Fraction) else as_written(w) for w in weights]
        scale = lcm(*(f.denominator for f in exact))
        self._weights = [int(f * scale) for f in exact]
        heaviest_first = sorted(range(len(weights)), key=lambda i: -self._weights[i])
        trees = [self._tree(heaviest_first, split) for split in (self._by_weight, self._by_number)]
        self._root = min(trees, key=self._error)
        self.bound = float(self._error(self._root))
        """Largest difference, in samples, between any corpus's count and its share."""

    def __len__(self) -> int:
        return len(self._weights)

    def place(self, n: int) -> tuple[int, int]:
        """(corpus, sample of that corpus) of sample n, n >= 0."""
        node = self._root
        while isinstance(node, _Node):
            before = node.left_count(n)
            goes_left = node.left_count(n + 1) > before
            node, n = (node.left, before) if goes_left else (node.right, n - before)
        return node, n

    def counts(self, n: int) -> list[int]:
        """Number of samples that each corpus gives among the first n."""
        result = [0] * len(self)
        pending = [(self._root, n)]
        while pending:
            node, count = pending.pop()
            if isinstance(node, _Node):
                left = node.left_count(count)
                pending += [(node.left, left), (node.right, count - left)]
            else:
                result[node] = count
        return result

    def _weight(self, corpora: list[int]) -> int:
        return sum(self._weights[i] for i in corpora)

    def _tree(self, corpora: list[int], split: Callable[[list[int]], int]) -> _Node | int:
        """The tree over `corpora` (heaviest first), each set divided at the index that `split` returns."""
        if len(corpora) == 1:
            return corpora[0]
        at = split(corpora)
        left, right = corpora[:at], corpora[at:]
        return _Node(self._tree(left, split), self._tree(right, split), self._weight(left), self._weight(corpora))

    def _by_weight(self, corpora: list[int]) -> int:
        """The smallest number of heaviest corpora that together have a third of the weight."""
        third = Fraction(self._weight(corpora), 3)
        return 1 + sum(left < third for left in accumulate(self._weights[i] for i in corpora[:-1]))

    def _by_number(self, corpora: list[int]) -> int:
        """Half of the corpora."""
        return len(corpora) // 2

    def _error(self, node: _Node | int, inherited: Fraction = Fraction(0)) -> Fraction:
        """The largest error of a corpus below `node`, whose own error is at most `inherited`."""
        if isinstance(node, int):
            return inherited
        half = Fraction(1, 2)
        left = half + Fraction(node.share, node.total) * inherited
        right = half + Fraction(node.total - node.share, node.total) * inherited
        return max(self._error(node.left, left), self._error(node.right, right))
