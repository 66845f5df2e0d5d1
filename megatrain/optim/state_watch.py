"""Masters and states may change in an update alone: sums of their bits show what changed by itself in between.

A shard has one owner under ZeRO 1 to 3, so that no copy tells of a flipped bit in it: the master spreads over all ranks with the next
gather. So each rank sums the bits of what it owns after an update, and again before the next one:

    update 6 | sum -----------------------------------> sum = the same? | update 7 | sum ---- ...
             | forward, backward, reduction, a save ... |

The whole parameters that a forward read, which the gather overwrites, are summed before each update too, into a number that remembers
every step since the beginning; the replicas compare theirs at an audit (`audit.py`). Both are sums of 64-bit words, row by row (one
flipped bit always changes a sum), so the rows name the parameter; they stay on the device, and nothing waits for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import torch

from megatrain.optim.optimizer import Optimizer
from megatrain.parallel.flat import ALIGNMENT, LocalBucket
from megatrain.parallel.param import Parameter
from megatrain.parallel.zero import FlatParameters

ROWS = 1 << 16
"""At most twice as many rows are summed of a tensor; of one with fewer words a row is as short as no two parameters share."""
_ODD = 0x5851F42D4C957F2D
"""Each step multiplies what is remembered by this, so that no two changes cancel by being alike."""
FREE_BYTES = 1 << 22
"""State that is watched at every step whatever the model costs: a core takes a third of a millisecond."""
SHARE = 0.003
"""Part of a step's time that watching may take."""
BALANCE = {"cuda": 200.0, "cpu": 10.0}
"""FLOPs that a device does in a training step in the time in which it sums a byte: 400 TFLOP/s and 2 TB/s; a core in BF16 190 GFLOP/s and
19 GB/s (measured).
"""


class StateWatch:
    """Watches what this rank owns of one run."""

    def __init__(self, flat: FlatParameters, optimizer: Optimizer) -> None:
        self._flat, self._optimizer = flat, optimizer
        self._step: int | None = None
        self._sums = torch.cat([row_sums(tensor) for _, _, tensor in self._owned()])
        self._seen = torch.zeros_like(self._sums)
        """For each row, the first update before which it had changed by itself; 0: none."""
        self._replicated = [local for local in flat.buckets if local.stage < 3 and local.shards.size * local.replicas.size > 1]
        self._whole = [local.weights for local in self._replicated if local.weights is not None]
        """The weights of the buckets of which replicas have all, too; they lie in one place for good."""
        self._remembered = [torch.zeros_like(row_sums(weights)) for weights in self._whole]
        """For each row of these weights a number made of its sums before all updates so far, in which replicas differ if a row ever did."""

    @property
    def nbytes(self) -> int:
        """Bytes that are read in a step."""
        return sum(weights.nbytes for weights in self._whole) + 2 * sum(tensor.nbytes for _, _, tensor in self._owned())

    def after_update(self, step: int) -> None:
        """Update number `step`, from 1, has been made: remember its result."""
        self._step = step
        self._sums = torch.cat([row_sums(tensor) for _, _, tensor in self._owned()])

    def before_update(self, step: int) -> None:
        """The next update after number `step` is about to be made. Nothing is compared if `after_update` was not told of that one."""
        if step != self._step:
            return
        self._flat.settle()
        now = torch.cat([row_sums(tensor) for _, _, tensor in self._owned()])
        self._seen.masked_fill_((now != self._sums) & (self._seen == 0), step + 1)
        for weights, remembered in zip(self._whole, self._remembered, strict=True):
            remembered.mul_(_ODD).add_(row_sums(weights))

    def used(self) -> Iterator[tuple[Parameter, torch.Tensor]]:
        """The parameters that replicas have too, with what is remembered of the rows in which they lie [rows]."""
        for local, weights, remembered in zip(self._replicated, self._whole, self._remembered, strict=True):
            for parameter, _, at, length in local.bucket.ranges(0, local.bucket.size):
                yield parameter, remembered[rows_of(weights, at, length)]

    def changed(self) -> list[tuple[str, str, int]]:
        """(what, parameter, update before which it was seen) of all that has changed by itself; on a GPU the host waits here."""
        seen, found, begin = self._flat.ctx.world.to_host(self._seen), [], 0
        if not seen.any():
            return []
        for what, local, tensor in self._owned():
            rows = seen[begin : begin + row_count(tensor)]
            begin += len(rows)
            for parameter, _, at, length in local.bucket.ranges(local.own.start, local.own.stop):
                steps = rows[rows_of(tensor, at, length)]
                if steps.any():
                    found.append((what, parameter.spec.name, int(steps[steps > 0].min())))
        return found

    def _owned(self) -> Iterator[tuple[str, LocalBucket, torch.Tensor]]:
        """All that this rank updates, and its part of what is frozen."""
        for local in self._flat.buckets:
            yield "parameter", local, local.own_weights
        for index, local in enumerate(self._flat.trained):
            for what, tensor in kinds(self._optimizer, index).items():
                yield what, local, tensor


def kinds(optimizer: Optimizer, index: int) -> dict[str, torch.Tensor]:
    """Masters and states of a trained bucket on this rank, by name: flat tensors of one length."""
    masters = optimizer.masters[index]
    found = {"master": masters.masters, "low half of": masters.low, **optimizer.states[index]}
    return {what: tensor for what, tensor in found.items() if tensor is not None}


def _width(tensor: torch.Tensor) -> tuple[int, int]:
    """(64-bit words of a tensor, words in a row)."""
    words, width = tensor.nbytes // 8, ALIGNMENT * tensor.element_size() // 8
    while words // width > ROWS:
        width *= 2
    return words, width


def row_count(tensor: torch.Tensor) -> int:
    """Number of rows that a tensor is summed in."""
    words, width = _width(tensor)
    return -(-words // width)


def rows_of(tensor: torch.Tensor, at: int, length: int) -> slice:
    """The rows in which elements at .. at + length - 1 lie."""
    row = 8 * _width(tensor)[1] // tensor.element_size()
    return slice(at // row, (at + length - 1) // row + 1)


def row_sums(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the 64-bit words of each row of a flat tensor, whose length is a multiple of ALIGNMENT: int64 [rows], modulo 2^64."""
    words, width = _width(tensor)
    data, whole = tensor.detach().view(torch.int64), words // width * width
    sums = data[:whole].view(-1, width).sum(1)
    return sums if whole == words else torch.cat([sums, data[whole:].sum()[None]])


def watched_every(nbytes: int, flops: float, device: torch.device) -> int:
    """Steps between those before which state is watched, so that it takes SHARE of the time at most; 1 where that is short.

    nbytes: read each time. flops: of a step on this rank.
    """
    return 1 if nbytes <= FREE_BYTES else max(1, ceil(nbytes * BALANCE[device.type] / (SHARE * flops)))
