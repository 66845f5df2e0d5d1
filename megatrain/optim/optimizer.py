"""The optimizer: FP32 master weights and states of what this rank owns, one update per step.

BF16 has 8 bits of mantissa: an update smaller than 1/256 of a weight would be lost. So BF16 parameters are only a rounded copy of
float32 masters, gradients are summed in float32 (`FlatParameters`), and the update happens on the masters (the BF16 optimizer of
BLOOM's run; Micikevicius et al., arXiv:1710.03740, section 3.1). In FP32 and FP64 runs the parameters are their own masters.

    master: fp32      BF16 parameter 2 + master 4                    bytes a parameter, and the states
    master: split     BF16 parameter 2 + the 16 bits it lacks 2      the same numbers to the bit (kernels/split_float.py)

Where Triton serves, AdamW and Adam are one kernel, which does all of this in one pass (kernels/adamw.py). Else a buffer is updated block by
block, so that what one operation wrote is still in a CPU's cache when the next one reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch

from megatrain.config.schema import OptimConfig, TrainConfig
from megatrain.kernels.adamw import AdamRates, adam_reference, adam_triton
from megatrain.kernels.dispatch import Kernels, use_triton
from megatrain.kernels.split_float import join_float, round_to_bf16, split_float
from megatrain.parallel.flat import Cut, Elements, Held, Plain, Portion, Segment, Window
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.param import ParamSpec, Part
from megatrain.parallel.zero import FlatParameters
from megatrain.transport.host import to_device

# Dynamic loss scaling for FP16 (Micikevicius et al., arXiv:1710.03740, section 3.2).
#
# FP16 has 5 bits of exponent: gradients below 6e-8 vanish. So the loss is multiplied by a scale before the backward, and gradients are
# divided by it before the update. The scale is as large as it can be: it doubles after `window` updates without an overflow, and halves
# at overflows once `hysteresis` of them have come without such a window between. A step that overflowed anywhere changes no weight on
# any rank: whether it did is known from the one all-reduce of the step, so the scale is the same on all ranks.
#
# In every other precision the scale is 1 and stays so.


class LossScale:
    """The scale and its counters, on the device, so that the host need not wait to know of an overflow."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.dynamic = config.precision == "fp16"
        self.window, self.hysteresis, self.least = config.loss_scale_window, config.loss_scale_hysteresis, config.loss_scale_min
        first = config.loss_scale if self.dynamic else 1.0
        self._state = torch.tensor([first, 0.0, self.hysteresis], dtype=torch.float64, device=device)

    @property
    def scale(self) -> torch.Tensor:
        """float64 scalar."""
        return self._state[0]

    def update(self, overflow: torch.Tensor) -> None:
        """Take note of a step; overflow: scalar 0 or 1."""
        if not self.dynamic:
            return
        scale, good, left = self._state
        over = overflow > 0
        left = torch.where(over, left - 1, left)
        good = torch.where(over, 0.0, good + 1)
        grow = good >= self.window
        halved = torch.clamp(scale / 2, min=self.least)
        scale = torch.where(over & (left <= 0), halved, torch.where(grow, scale * 2, scale))
        self._state = torch.stack([scale, torch.where(grow, 0.0, good), torch.where(grow, float(self.hysteresis), left)])

    def state(self) -> list[float]:
        """What a checkpoint keeps: scale, updates since the last overflow or growth, overflows left."""
        return [float(value) for value in self._state.tolist()]

    def restore(self, state: list[float]) -> None:
        """Go on from an FP16 checkpoint, within the bounds of now."""
        if self.dynamic:
            scale, good, left = state
            bounded = [max(scale, self.least), good, min(left, self.hysteresis)]
            self._state = torch.tensor(bounded, dtype=torch.float64, device=self._state.device)


# Global gradient norm: every logical element counted once, whatever the layout.


BLOCK = 2**18
"""Elements whose squares are added up at a time on a CPU: 2 MiB in float64."""
ROW = 4096
"""Elements of float32 whose squares a CPU adds up in float32."""


def _counts(segment: Segment, flat: FlatParameters, ctx: ParallelContext) -> bool:
    """Whether this rank is the one, of those that own these elements, that counts them."""
    return flat.replicas.rank == 0 and segment.parameter.spec.owned(ctx)


def _squares(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of squares, good to 1e-6 whatever their size, of pieces of the tensors [n]: (float64 [pieces], which tensor each is of, on
    the CPU: int64 [pieces]).

    On a GPU each number is widened as it is read. torch on a CPU makes a float64 copy of what it takes such a norm of, which lasts ten
    times as long as the sum: there rows of float32 are summed in float32, and in float64 the rest, in blocks.
    """
    numbers: list[int] = []
    row_numbers: list[int] = []
    pieces: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    for number, x in enumerate(tensors):
        whole = len(x) // ROW * ROW if x.dtype == torch.float32 and x.device.type == "cpu" else 0
        if whole:
            rows.append(x[:whole].view(-1, ROW))
            row_numbers += [number] * (whole // ROW)
        rest = [x] if x.is_cuda else x[whole:].split(BLOCK)
        numbers += [number] * len(rest)
        pieces += rest
    norms = [torch.stack(torch._foreach_norm(pieces, 2, torch.float64)), *([_row_norms(rows)] if rows else [])]
    return torch.cat(norms).square(), torch.tensor(numbers + row_numbers)


def _row_norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """float32 [rows, ROW] each -> norms of all rows, float64; of rows with squares that are no float32, from float64."""
    norms = torch.cat([torch.linalg.vector_norm(rows, dim=1) for rows in tensors]).double()
    narrow = (norms > 1e-15) & (norms < 1e18)
    if not narrow.all():
        counts = [len(rows) for rows in tensors]
        for rows, mine, of in zip(tensors, norms.split(counts), narrow.split(counts), strict=True):
            if not of.all():
                wide = ~of & rows.any(1)  # zeros, as an embedding has many of, are no small numbers
                mine[wide] = torch.linalg.vector_norm(rows[wide], dim=1, dtype=torch.float64)
    return norms


def local_squared_norm(flat: FlatParameters, ctx: ParallelContext) -> torch.Tensor:
    """This rank's share of the squared gradient norm: float64 scalar, to be summed over the world.

    A rank looks at the gradients that it owns. Of ranks that own the same elements (replicas of a shard, copies over tp) the
    first one counts them; padding is zero. The others multiply by zero, which leaves NaN for a copy that is not finite: no rank
    may update what another one skips.
    """
    segments = list(flat.segments())
    if not segments:
        return torch.zeros((), dtype=torch.float64, device=ctx.device)
    counts = torch.tensor([float(_counts(s, flat, ctx)) for s in segments], dtype=torch.float64)
    squares, owners = _squares([s.gradient for s in segments])
    (mine,) = to_device([counts[owners]], ctx.device)
    return (squares * mine).sum()


def clip_divisor(norm: torch.Tensor, clip_grad: float) -> torch.Tensor:
    """What to divide gradients by so that their norm is at most `clip_grad` (0: never clip): at least 1; float64 scalar tensor.

    As torch.nn.utils.clip_grad_norm_, whose 1e-6 keeps curves comparable.
    """
    if clip_grad == 0:
        return torch.ones_like(norm)
    return ((norm + 1e-6) / clip_grad).clamp_min(1.0)


PARTS: tuple[Part, ...] = get_args(Part)
"""Of a model, for reports."""


def part_norms(flat: FlatParameters, ctx: ParallelContext, loss_scale: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Part -> (norm of its gradients, norm of its weights), over the whole model (collective over the world; before the update)."""
    segments = [s for s in flat.segments() if _counts(s, flat, ctx)]
    parts = torch.tensor([PARTS.index(s.parameter.spec.part) for s in segments], dtype=torch.int64)
    both = torch.zeros(2, len(PARTS), dtype=torch.float64, device=ctx.device)
    if segments:
        for kind, tensors in enumerate(([s.gradient for s in segments], [s.weight for s in segments])):
            squares, owners = _squares(tensors)
            mine = (parts[owners] == torch.arange(len(PARTS))[:, None]).to(ctx.device)  # [parts, n]
            both[kind] = squares.where(mine, 0.0).sum(1)
    gradients, weights = ctx.world.all_reduce(both).sqrt()
    rows = ctx.world.to_host(torch.stack([gradients / loss_scale, weights], 1)).tolist()
    return {part: (gradient, weight) for part, (gradient, weight) in zip(PARTS, rows, strict=True) if weight > 0}


# Stochastic gradient descent with momentum, as one function on lists of flat tensors.


def sgd_step(
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momentum_buffers: Sequence[torch.Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    grad_divisor: torch.Tensor,
    skip: torch.Tensor,
) -> None:
    """m <- momentum m + (g / grad_divisor + weight_decay w); w <- w - lr m. In place; nothing changes where `skip` is 1.

    `grad_divisor` and `skip` are scalar tensors on the device; a skipped step multiplies by one and adds zero.
    """
    keep = skip > 0
    for w, g, m in zip(weights, grads, momentum_buffers, strict=True):
        update = torch.where(keep, m, (g / grad_divisor).add_(w, alpha=weight_decay).add_(m, alpha=momentum))
        m.copy_(update)
        w.sub_(torch.where(keep, torch.zeros_like(m), m), alpha=lr)


StateTensors = dict[str, dict[str, tuple[ParamSpec, torch.Tensor]]]
"""Kind (weights, exp_avg, ...) -> logical name -> (spec, this tensor-parallel rank's tensor)."""

STATES = {"adamw": ("exp_avg", "exp_avg_sq"), "adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum",)}
"""optim.name -> its states, each of the size of the masters."""
BLOCK = 1 << 18
"""Elements updated at a time on a CPU; a GPU takes GPU_BLOCK."""
GPU_BLOCK = 1 << 26


class Masters:
    """The weights at full precision of one bucket's own part: the parameters themselves, float32 copies, or halves."""

    def __init__(self, held: Held, wide: torch.dtype, master: Literal["fp32", "split"]) -> None:
        self.weights = held.own_weights
        apart = self.weights.dtype != wide
        self.low = torch.zeros_like(self.weights, dtype=torch.int16) if apart and master == "split" else None
        self.masters = self.weights.to(wide) if apart and master == "fp32" else None
        self.wide = wide

    @property
    def dtype(self) -> torch.dtype:
        """Of what `read` gives."""
        return self.wide if self.low is not None or self.masters is not None else self.weights.dtype

    @property
    def direct(self) -> bool:
        """Whether the parameters are their own masters, and `read` gives views of them."""
        return self.masters is None and self.low is None

    @property
    def nbytes(self) -> int:
        """Bytes besides the parameters."""
        return sum(buffer.nbytes for buffer in (self.low, self.masters) if buffer is not None)

    def read(self, part: slice) -> torch.Tensor:
        """Elements of the masters, to be changed in place and given to `write`."""
        if self.masters is not None:
            return self.masters[part]
        if self.low is None:
            return self.weights[part]
        joined = torch.empty_like(self.low[part], dtype=torch.float32)
        join_float(joined, self.weights[part], self.low[part])
        return joined

    def write(self, part: slice, values: torch.Tensor) -> None:
        """Let the elements that `read` gave, changed, be the masters, and the parameters their rounded copy."""
        if self.masters is not None and self.weights.dtype == torch.bfloat16:
            round_to_bf16(self.weights[part], values)
        elif self.masters is not None:
            self.weights[part].copy_(values)
        elif self.low is not None:
            split_float(self.weights[part], self.low[part], values)


class Optimizer:
    """Masters and states of this rank's shards; `updates` (float32 scalar) counts the updates applied."""

    def __init__(self, flat: FlatParameters, config: OptimConfig, kernels: Kernels = "auto") -> None:
        """kernels: train.kernels. Float64 is the reference's alone, and so is SGD."""
        self.flat, self.config = flat, config
        self.fused = use_triton(kernels, flat.ctx.device) and config.name != "sgd" and flat.wide == torch.float32
        # Counted on the device, because a skipped step does not count and the host need not know of it.
        self.updates = torch.zeros((), dtype=torch.float32, device=flat.ctx.device)
        self.masters = [Masters(held, flat.wide, config.master) for held in flat.trained]
        self.states = {
            kind: [torch.zeros_like(held.own_weights, dtype=flat.wide) for held in flat.trained] for kind in STATES[config.name]
        }

    @property
    def nbytes(self) -> int:
        """Bytes of masters and states that stay between steps, alignment included; the counter of updates apart."""
        return sum(m.nbytes for m in self.masters) + sum(piece.nbytes for kind in self.states.values() for piece in kind)

    def step(self, lr: float, grad_divisor: torch.Tensor, skip: torch.Tensor, weight_decay: float | None = None) -> None:
        """Update masters and states from the gradients, round the parameters, and let other ranks have them.

        weight_decay: of this step; None means optim.weight_decay. Where `skip` (scalar 0 or 1) nothing changes.
        """
        self.updates += 1 - skip.to(torch.float32)
        decay = self.config.weight_decay if weight_decay is None else weight_decay
        adamw = self.config.name == "adamw"
        rates = AdamRates(lr, self.config.betas, self.config.eps, adamw, self.updates, grad_divisor, skip)
        for index in reversed(range(len(self.masters))):  # the first layers first: the next forward begins with them
            held = self.flat.trained[index]
            self._update(index, rates, decay if held.bucket.decay else 0.0)
            self.flat.publish(held)

    def _update(self, index: int, rates: AdamRates, decay: float) -> None:
        """Update what this rank owns of one bucket."""
        masters, grads = self.masters[index], self.flat.trained[index].own_grads
        if grads is None:
            raise ValueError("a frozen bucket has no optimizer state")
        states = [self.states[kind][index] for kind in STATES[self.config.name]]
        if self.fused:
            adam_triton(rates, decay, masters.weights, masters.masters, masters.low, grads, *states)
            return
        for part in _blocks(grads, whole=masters.direct):
            weights = masters.read(part)
            self._apply(rates, decay, weights, grads[part], [state[part] for state in states])
            masters.write(part, weights)

    def _apply(
        self, rates: AdamRates, decay: float, weights: torch.Tensor, grads: torch.Tensor, states: list[torch.Tensor]
    ) -> None:
        """The rule of `optim.name`, in place."""
        if self.config.name == "sgd":
            sgd_step(
                [weights],
                [grads],
                states,
                momentum=self.config.momentum,
                lr=rates.lr,
                weight_decay=decay,
                grad_divisor=rates.grad_divisor,
                skip=rates.skip,
            )
        else:
            adam_reference(rates, decay, weights, grads, *states)

    def tensors(self) -> StateTensors:
        """Everything a checkpoint needs: weights at master precision (frozen ones too), and the states (collective).

        For tests and comparisons: whole tensors, at ZeRO stage 0 without BF16 views, else copies. `portions` has what lies here.
        """
        everything = slice(None)
        weights = {id(held): m.read(everything) for held, m in zip(self.flat.trained, self.masters, strict=True)}
        pieces = [weights.get(id(held), held.own_weights) for held in self.flat.held]
        found = {"weights": self.flat.whole(pieces, frozen=True)}
        return found | {kind: self.flat.whole(pieces) for kind, pieces in self.states.items()}

    def portions(self) -> dict[str, dict[str, Portion]]:
        """What this rank owns of the kinds that `tensors` has, where it lies; to be followed by `refresh` when it was changed."""
        flat = self.flat
        trained = {id(held): index for index, held in enumerate(flat.trained)}
        found: dict[str, dict[str, Portion]] = {kind: {} for kind in ("weights", *self.states)}
        for held in flat.held:
            index = trained.get(id(held))
            elements: dict[str, Elements] = {"weights": Plain(held.own_weights)}
            if index is not None:
                elements = {kind: Plain(pieces[index]) for kind, pieces in self.states.items()}
                elements["weights"] = self.masters[index]
            bucket = held.bucket
            starts = dict(zip(bucket.parameters, bucket.starts, strict=True))
            for parameter, first, at, count in bucket.segments(held.own.start, held.own.stop):
                cut = Cut(starts[parameter], bucket.part)
                for kind, of_bucket in elements.items():
                    portion = Portion(parameter.spec, first, count, Window(of_bucket, at), cut)
                    found[kind][parameter.spec.name] = portion
        order = [p.spec.name for unit in flat.units for p in unit.parameters]
        return {kind: {name: named[name] for name in order if name in named} for kind, named in found.items()}

    def refresh(self) -> None:
        """Let other ranks have what was written into `portions`."""
        for held in self.flat.held:
            self.flat.publish(held)


def _blocks(buffer: torch.Tensor, whole: bool) -> Iterator[slice]:
    """The elements of a buffer in blocks; in one where there is only one operation to do."""
    size = buffer.numel() if whole else GPU_BLOCK if buffer.is_cuda else BLOCK
    for start in range(0, buffer.numel(), max(size, 1)):
        yield slice(start, start + size)
