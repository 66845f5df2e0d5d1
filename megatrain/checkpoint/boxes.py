"""Boxes of a tensor (a slice per dim). A rank's part and a file's part of a tensor are both boxes; elements are copied where they meet.

A range of elements, counted row by row, is a few boxes:   . . x x x        part of a row
                                                           x x x x x        whole rows
                                                           x . . . .        part of a row
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch

Box = tuple[slice, ...]


def numel(box: Box) -> int:
    """Number of elements of a box."""
    return prod(part.stop - part.start for part in box)


def intersect(a: Box, b: Box) -> Box:
    """The intersection of two boxes, which may be empty."""
    shared = ((max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))
    return tuple(slice(start, max(start, stop)) for start, stop in shared)


def within(box: Box, outer: Box) -> Box:
    """`box` in coordinates relative to the corner of `outer`."""
    return tuple(slice(x.start - y.start, x.stop - y.start) for x, y in zip(box, outer, strict=True))


def moved(box: Box, outer: Box) -> Box:
    """The inverse of `within`."""
    return tuple(slice(x.start + y.start, x.stop + y.start) for x, y in zip(box, outer, strict=True))


def of_run(shape: tuple[int, ...], first: int, stop: int) -> Iterator[Box]:
    """The boxes of elements first .. stop - 1 of a tensor, counted row by row."""
    if first >= stop:
        return
    if not shape:
        yield ()
        return
    inner = prod(shape[1:])
    (row, start), (last, end) = divmod(first, inner), divmod(stop, inner)
    if row == last:
        yield from ((slice(row, row + 1), *box) for box in of_run(shape[1:], start, end))
        return
    if start:
        yield from ((slice(row, row + 1), *box) for box in of_run(shape[1:], start, inner))
        row += 1
    if row < last:
        yield (slice(row, last), *(slice(0, n) for n in shape[1:]))
    yield from ((slice(last, last + 1), *box) for box in of_run(shape[1:], 0, end))


def view(run: torch.Tensor, shape: tuple[int, ...], first: int, box: Box) -> torch.Tensor:
    """View of `box` of a tensor of `shape`. `run` [n] holds the tensor's elements from number `first` on, those of `box` among them."""
    strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    offset = sum(part.start * stride for part, stride in zip(box, strides, strict=True)) - first
    size = [part.stop - part.start for part in box]
    return run.as_strided(size, strides, run.storage_offset() + offset)


def reach(shape: tuple[int, ...], box: Box) -> tuple[int, int]:
    """The numbers, counted row by row, of the first element of a non-empty box and of the one after its last."""
    first = last = 0
    for n, part in zip(shape, box, strict=True):
        first, last = first * n + part.start, last * n + part.stop - 1
    return first, last + 1


def span(shape: tuple[int, ...], several: list[Box]) -> tuple[int, int]:
    """The numbers, counted row by row, of the first element of several boxes and of the one after the last."""
    ends = [reach(shape, box) for box in several]
    return min(first for first, _ in ends), max(stop for _, stop in ends)
