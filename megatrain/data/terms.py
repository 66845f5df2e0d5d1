"""The deal of a run's samples to its corpora, where weights change on the way and corpora end: stretches that begin at known samples.

    data.train      web 0.7, code 0.3           data.schedule    from_share: 0.75, weights: {web: 0.3, code: 0.7}
                    code: max_epochs 2                           (code has 500 samples)

    sample          0                          3000                 3143         4000
    stretches       |-- web 0.7, code 0.3 -----|- web 0.3, code 0.7 -|--- web ----|
    given before    web 0, code 0              2100, 900             2143, 1000   3000, 1000

All of it follows from the `Terms` of the run, which a checkpoint keeps: a batch is a function of the samples consumed, however often the
run was stopped. A run that goes on with other terms begins a stretch where it is, and each corpus goes on behind its last sample.

Error bound. Within a stretch a corpus is off by at most the `bound` of its blend (data/blend.py: 1/2 for two corpora, less than 1 for
three and four, less than 2 for any number). Every stretch deals anew, so over k stretches a corpus is off by at most the sum of k bounds.
Up to the end of the run no corpus gives more samples than its epochs allow.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from megatrain.config.pieces import Weighting, as_written, end_of, pieces_of
from megatrain.config.schema import Config
from megatrain.data.blend import Blend


class UsedUpError(ValueError):
    """The run is longer than the epochs of its corpora allow."""

    def __init__(self, sample: int, given: Sequence[int]) -> None:
        """sample: the first one that no corpus has; given: samples that each corpus has given before."""
        super().__init__(f"every corpus that has a share of sample {sample} has been seen as often as its epochs allow")
        self.sample, self.given = sample, tuple(given)


class NothingLeftError(ValueError):
    """Corpora that are seen so often leave no sample to those that have weights."""

    def __init__(self, share: Fraction) -> None:
        """share: the samples of corpora with epochs, as a share of the run."""
        super().__init__(f"corpora with epochs have {float(share):.1%} of the samples, and others have weights")
        self.share = share


@dataclass(frozen=True)
class Terms:
    """The terms on which samples are dealt from some sample on."""

    pieces: tuple[Weighting, ...]
    """Weights over the run; the first piece begins at 0."""
    end: int
    """Samples of the run."""
    most: tuple[int | None, ...]
    """The most samples of each corpus, by its epochs; None: any number."""
    even: tuple[bool, ...]
    """Whether a corpus has the share by which it has given `most` samples at the end, whatever its weight."""
    first: int = 0
    """Sample from which on they hold."""
    before: tuple[int, ...] = ()
    """Samples that each corpus has given before; empty: none."""

    @property
    def given(self) -> tuple[int, ...]:
        """Samples that each corpus has given before."""
        return self.before or (0,) * len(self.most)

    def weights(self, n: int) -> tuple[float, ...]:
        """Weights of the piece that sample n is in."""
        return self.pieces[bisect_right([piece.first for piece in self.pieces], n) - 1].weights

    def agrees(self, other: Terms, n: int) -> bool:
        """Whether two ask for the same from sample n on."""

        def asked(terms: Terms) -> tuple[Any, ...]:
            bounded = any(most is not None for most in terms.most)
            ahead = [piece for piece in terms.pieces if piece.first > n]
            return terms.weights(n), ahead, terms.most, terms.even, terms.end if bounded else None

        return asked(self) == asked(other)


@dataclass(frozen=True)
class SampleStretch:
    """Samples that are dealt by the same shares."""

    first: int
    shares: tuple[Fraction, ...]
    """The share of each corpus; they need not sum up to 1."""
    before: tuple[int, ...]
    """Samples that each corpus has given before."""

    @cached_property
    def active(self) -> list[int]:
        """The corpora that have a share."""
        return [i for i, share in enumerate(self.shares) if share]

    @cached_property
    def blend(self) -> Blend:
        """The blend of these."""
        return Blend([self.shares[i] for i in self.active])

    def place(self, n: int) -> tuple[int, int]:
        """(corpus, sample of that corpus) of sample n."""
        which, place = self.blend.place(n - self.first)
        corpus = self.active[which]
        return corpus, self.before[corpus] + place

    def counts(self, n: int) -> tuple[int, ...]:
        """Number of samples that each corpus has given before sample n."""
        counts = list(self.before)
        for corpus, count in zip(self.active, self.blend.counts(n - self.first), strict=True):
            counts[corpus] += count
        return tuple(counts)


class Deal:
    """The corpus that sample n comes from, and its number there. Raises UsedUpError and NothingLeftError."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.stretches = tuple(_stretches(terms))
        self._firsts = [stretch.first for stretch in self.stretches]

    def place(self, n: int) -> tuple[int, int]:
        """(corpus, sample of that corpus) of sample n, from terms.first on. Raises ValueError for an earlier one."""
        return self._stretch(n).place(n)

    def counts(self, n: int) -> tuple[int, ...]:
        """Number of samples that each corpus has given before sample n, n >= terms.first."""
        return self._stretch(n).counts(n)

    def _stretch(self, n: int) -> SampleStretch:
        at = bisect_right(self._firsts, n) - 1
        if at < 0:
            raise ValueError(f"sample {n} lies before sample {self.terms.first}, from which on the run has these terms")
        return self.stretches[at]


def terms_of(
    config: Config,
    per_epoch: Sequence[Fraction | int],
    step: int = 0,
    consumed: int = 0,
    first: int = 0,
    before: tuple[int, ...] = (),
) -> Terms:
    """The terms of a config from sample `first` on, of a run that has taken `step` steps on `consumed` samples.

    per_epoch: samples in which each corpus is seen once; before: samples that each has given. Raises ValueError for epochs of less than a
    sample.
    """
    corpora = config.data.train
    most = []
    for i, (corpus, size) in enumerate(zip(corpora, per_epoch, strict=True)):
        key = "max_epochs" if corpus.epochs is None else "epochs"
        times = corpus.max_epochs if corpus.epochs is None else corpus.epochs
        most.append(None if times is None else math.floor(as_written(times) * size))
        if most[-1] == 0:
            raise ValueError(
                f"data.train[{i}].{key}={times:g} of {corpus.label}, which is seen once in {float(size):g} samples, is less than a sample. "
                f"Use data.train[{i}].{key}={math.ceil(100 / size) / 100:g} or more."
            )
    even = tuple(corpus.epochs is not None for corpus in corpora)
    return Terms(pieces_of(config, step, consumed), end_of(config, step, consumed), tuple(most), even, first, before)


def endless(weights: Sequence[float]) -> Terms:
    """The terms of samples by weights alone."""
    return Terms((Weighting(0, tuple(weights)),), 0, (None,) * len(weights), (False,) * len(weights))


def _stretches(terms: Terms) -> Iterator[SampleStretch]:
    """The stretches from terms.first on; the last one has no end."""
    first, given, none = terms.first, terms.given, (0,) * len(terms.most)
    taken = sum(_constant(terms, first, given), Fraction(0))
    if taken >= 1 and first < terms.end and any(terms.weights(first)):
        raise NothingLeftError(taken)
    while any(shares := _shares(terms, first, given)):
        yield (stretch := SampleStretch(first, shares, given))
        ends = [piece.first for piece in terms.pieces if piece.first > first][:1]
        most = {i: most for i in stretch.active if (most := terms.most[i]) is not None}
        ends += [_first_end(stretch, most)] if most else []
        if not ends:
            return
        first = min(ends)
        given = stretch.counts(first)
    if first < terms.end:
        raise UsedUpError(first, given)
    shares = _shares(terms, terms.first, none)  # for samples beyond the end, where others were left out: whatever the epochs
    yield SampleStretch(first, shares if any(shares) else (Fraction(1),) * len(given), given)


def _shares(terms: Terms, n: int, given: Sequence[int]) -> tuple[Fraction, ...]:
    """The share of each corpus from sample n on; 0 for those that have given all that they may.

    The others share by their weights what those with epochs leave.
    """
    lasts = [most is None or had < most for most, had in zip(terms.most, given, strict=True)]
    weights = [as_written(weight) if of else Fraction(0) for weight, of in zip(terms.weights(n), lasts, strict=True)]
    constant = _constant(terms, n, given)
    rest = max(Fraction(0), 1 - sum(constant)) / (sum(weights) or Fraction(1))
    return tuple(c if even else w * rest for c, w, even in zip(constant, weights, terms.even, strict=True))


def _constant(terms: Terms, n: int, given: Sequence[int]) -> list[Fraction]:
    """The shares by which corpora with epochs have given all that they may at the end of the run; 0 for the others."""
    ahead = max(1, terms.end - n)
    of = zip(terms.most, given, terms.even, strict=True)
    return [Fraction(max(0, (most or 0) - had), ahead) if even else Fraction(0) for most, had, even in of]


def _first_end(stretch: SampleStretch, most: Mapping[int, int]) -> int:
    """The sample behind that by which the first corpus of a stretch has given all that it may. most: samples, by corpus."""

    def ended(length: int) -> bool:
        counts = stretch.counts(stretch.first + length)
        return any(counts[i] >= bound for i, bound in most.items())

    high = 1
    while not ended(high):
        high *= 2
    return stretch.first + bisect_left(range(high), True, lo=high // 2, key=ended)


def state_of(terms: Terms, seq_length: int) -> dict[str, Any]:
    """Terms as plain JSON, for a checkpoint."""
    return {**asdict(terms), "seq_length": seq_length}


def restored(state: Mapping[str, Any]) -> Terms:
    """The terms that `state_of` made."""
    pieces = tuple(Weighting(piece["first"], tuple(piece["weights"])) for piece in state["pieces"])
    most, even, before = (tuple(state[name]) for name in ("most", "even", "before"))
    return Terms(pieces, state["end"], most, even, state["first"], before)
