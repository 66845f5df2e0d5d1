"""Samples without those of some windows, and where in the files each sample lies.

    all samples    0 1 2 3 4 5 6 7 8 ...        windows [2, 4) and [5, 6)
    left           0 1     4   6 7 8 ...
    numbered       0 1     2   3 4 5 ...

A run that left out a window goes on with the samples behind it, and counts as consumed only those that it has seen: batches, learning
rates and length stay a function of that number alone, whatever the layout, and the windows are all that a checkpoint keeps besides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from megatrain.data.loader import Ints, Samples

Window = tuple[int, int]
"""(first, end) numbers of samples."""


class Origin(NamedTuple):
    """The part of a document that some tokens of a sample are."""

    file: str
    document: int
    """Number of the document in the file, from 0."""
    offset: int
    """Place of the piece's first token in the file, in tokens from 0."""
    tokens: int


class Located(Samples, Protocol):
    """Samples that know where they come from."""

    def pieces(self, n: int) -> list[Origin]:
        """Where the tokens of sample n are."""


Source = TypeVar("Source", bound=Located)


class LeftOut(Generic[Source]):
    """The samples of `source` without those of `windows`, numbered anew."""

    def __init__(self, source: Source, windows: Iterable[Window] = ()) -> None:
        self.source, self._windows = source, merged(windows)

    @property
    def windows(self) -> tuple[Window, ...]:
        """The windows: sorted, apart, none empty."""
        return self._windows

    def leave_out(self, *windows: Window) -> None:
        """Leave out more windows; no batch may be in the making."""
        self._windows = merged((*self._windows, *windows))

    def number(self, n: int) -> int:
        """Number in the source of sample n."""
        for first, end in self._windows:
            if n < first:
                break
            n += end - first
        return n

    def window(self, first: int, end: int) -> Window:
        """The numbers in the source from that of sample `first` to behind that of sample `end` - 1."""
        return self.number(first), self.number(end - 1) + 1

    def sample(self, n: int) -> Ints:
        """Tokens of sample n."""
        return self.source.sample(self.number(n))

    def document_numbers(self, n: int) -> Ints:
        """Number of each token's document within sample n."""
        return self.source.document_numbers(self.number(n))

    def pairs(self, n: int) -> list[tuple[Ints, Ints]] | None:
        """Prompts and answers of sample n, if it consists of those."""
        return self.source.pairs(self.number(n))

    def pieces(self, n: int) -> list[Origin]:
        """Where the tokens of sample n are."""
        return self.source.pieces(self.number(n))


def merged(windows: Iterable[Sequence[int]]) -> tuple[Window, ...]:
    """The same samples as sorted windows that do not touch."""
    found: list[Window] = []
    for first, end in sorted((int(first), int(end)) for first, end in windows):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        elif end > first:
            found.append((first, end))
    return tuple(found)
