"""The optimizer: FP32 master weights and states of what this rank owns, one update per step, after clipping by the global norm.

BF16 has 8 bits of mantissa: an update smaller than 1/256 of a weight would be lost. So BF16 parameters are only a rounded copy of
float32 masters, gradients are summed in float32 (`FlatParameters`), and the update happens on the masters (the BF16 optimizer of
BLOOM's run; Micikevicius et al., arXiv:1710.03740, section 3.1). In FP32 and FP64 runs the parameters are their own masters.

    master: fp32      BF16 parameter 2 + master 4                    bytes a parameter, and the states
    master: split     BF16 parameter 2 + the 16 bits it lacks 2      the same numbers to the bit (kernels/split_float.py)

A bucket is updated by one rule, a function on flat tensors: where Triton serves, AdamW and Adam are one kernel, which does all of this
in one pass (kernels/adamw.py). Else a buffer is updated block by block, so that what one operation wrote is still in a CPU's cache
when the next one reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch

from megatrain.config.schema import OptimConfig, TrainConfig
from megatrain.kernels.adamw import adam_numba, adam_reference, adam_triton
from megatrain.kernels.dispatch import Kernels, use_numba, use_triton
from megatrain.kernels.split_float import join_float, round_to_bf16, split_float
from megatrain.kernels.update import Update
from megatrain.parallel.mesh import ParallelContext
from megatrain.parallel.param import ParamSpec, Part
from megatrain.parallel.zero import FlatParameters
from megatrain.transport.host import to_device

BLOCK = 1 << 18
"""Elements that a CPU takes at a time: 1 MiB in float32."""
GPU_BLOCK = 1 << 26
ROW = 4096
"""Elements of float32 whose squares a CPU adds up in float32."""


# --- rules: how weights follow from gradients -----------------------------------------------------------------------------


def sgd_step(update: Update, decay: float, weights: torch.Tensor, grads: torch.Tensor, momentum: torch.Tensor) -> None:
    """Stochastic gradient descent of flat tensors [n] in place: m <- momentum m + (g / grad_divisor + decay w); w <- w - lr m.

    Nothing changes where `update.skip` is 1: a skipped step multiplies by one and adds zero.
    """
    keep = update.skip > 0
    following = (grads / update.grad_divisor).add_(weights, alpha=decay).add_(momentum, alpha=update.momentum)
    momentum.copy_(torch.where(keep, momentum, following))
    weights.sub_(torch.where(keep, torch.zeros_like(momentum), momentum), alpha=update.lr)


@dataclass(frozen=True)
class Rule:
    """How a bucket's weights follow from its gradients, and the states that this takes."""

    states: tuple[str, ...]
    """Names of the states, each a tensor of the size of the masters."""
    apply: Callable[..., None]
    """(update, weight decay, weights, gradients, *states): changes masters and states [n] in place."""
    fused: Callable[..., None] | None = None
    """`apply` as one Triton kernel: (update, weight decay, parameters, masters, low halves, gradients, *states)."""
    on_cpu: Callable[..., None] | None = None
    """`fused` as one numba kernel, for BF16 parameters on a CPU."""
    elementwise: bool = True
    """Whether `apply` may be given any part of a bucket; else all that this rank owns, with ranges=[ParameterRange, ...] of it."""


MOMENTS = ("exp_avg", "exp_avg_sq")
RULES = {
    "adamw": Rule(MOMENTS, adam_reference, adam_triton, adam_numba),
    "adam": Rule(
        MOMENTS,
        partial(adam_reference, decoupled=False),
        partial(adam_triton, decoupled=False),
        partial(adam_numba, decoupled=False),
    ),
    "sgd": Rule(("momentum",), sgd_step),
}
"""Values of optim.name."""


# --- masters and the update -------------------------------------------------------------------------------------------------


class Masters:
    """The weights at full precision of one bucket's own part: the parameters themselves, float32 copies, or halves."""

    def __init__(self, weights: torch.Tensor, wide: torch.dtype, master: Literal["fp32", "split"]) -> None:
        self.weights = weights
        apart = weights.dtype != wide
        self.low = torch.zeros_like(weights, dtype=torch.int16) if apart and master == "split" else None
        self.masters = weights.to(wide) if apart and master == "fp32" else None
        self.dtype = wide
        self.direct = not apart
        """Whether the parameters are their own masters, and `read` returns views of them."""

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
        """Let the elements that `read` returned, changed, be the masters, and the parameters their rounded copy."""
        if self.masters is not None and self.weights.dtype == torch.bfloat16:
            round_to_bf16(self.weights[part], values)
        elif self.masters is not None:
            self.weights[part].copy_(values)
        elif self.low is not None:
            split_float(self.weights[part], self.low[part], values)


class Optimizer:
    """Masters and states of this rank's shards; `updates` (float32 scalar) counts the updates applied."""

    def __init__(
        self, flat: FlatParameters, config: OptimConfig, kernels: Kernels = "auto", rules: Mapping[str, Rule] = RULES
    ) -> None:
        """kernels: train.kernels; float64 is the reference's alone. rules: by name; a bucket has that of its part of the model in
        `flat.rules`, else that of optim.name. Raises ValueError where there is no such part or rule.
        """
        self.flat, self.config = flat, config
        for part, name in flat.rules.items():
            if part not in get_args(Part) or name not in rules:
                raise ValueError(f"rules {part}={name}: parts are {', '.join(get_args(Part))}; rules are {', '.join(rules)}")
        triton = use_triton(kernels, flat.ctx.device) and flat.wide == torch.float32
        # Counted on the device, because a skipped step does not count and the host need not know of it.
        self.updates = torch.zeros((), dtype=torch.float32, device=flat.ctx.device)
        chosen = [rules[flat.rules.get(local.bucket.spec.part, config.name)] for local in flat.trained]
        numba = use_numba(kernels, flat.weights)
        self.rules = [rule if triton else replace(rule, fused=rule.on_cpu if numba else None) for rule in chosen]
        self.kinds = tuple(dict.fromkeys(kind for name in (config.name, *flat.rules.values()) for kind in rules[name].states))
        """Names of the states, also of those that no bucket of this rank has."""
        self.masters = [Masters(local.own_weights, flat.wide, config.master) for local in flat.trained]
        self.states = [
            {kind: torch.zeros_like(local.own_weights, dtype=flat.wide) for kind in rule.states}
            for local, rule in zip(flat.trained, self.rules, strict=True)
        ]
        """The states of each trained bucket, by name."""

    @property
    def nbytes(self) -> int:
        """Bytes of masters and states that stay between steps, alignment included; the counter of updates apart."""
        return sum(m.nbytes for m in self.masters) + sum(state.nbytes for of in self.states for state in of.values())

    def step(self, lr: float, grad_divisor: torch.Tensor, skip: torch.Tensor, weight_decay: float | None = None) -> None:
        """Update masters and states from the gradients, round the parameters, and let other ranks have them.

        weight_decay: of this step; None means optim.weight_decay. Where `skip` (scalar 0 or 1) nothing changes.
        """
        config = self.config
        self.updates += 1 - skip.to(torch.float32)
        decay = config.weight_decay if weight_decay is None else weight_decay
        update = Update(lr, config.betas, config.eps, config.momentum, self.updates, grad_divisor, skip)
        for index in reversed(range(len(self.masters))):  # the first layers first: the next forward begins with them
            local = self.flat.trained[index]
            self._update(index, update, decay if local.bucket.decay else 0.0)
            self.flat.publish(local)

    def _update(self, index: int, update: Update, decay: float) -> None:
        """Update what this rank owns of one bucket."""
        local, masters, rule, states = self.flat.trained[index], self.masters[index], self.rules[index], self.states[index]
        if rule.fused is not None:
            rule.fused(update, decay, masters.weights, masters.masters, masters.low, local.own_grads, *states.values())
            return
        given = {} if rule.elementwise else {"ranges": list(local.bucket.ranges(local.own.start, local.own.stop))}
        for part in _blocks(local.own_grads, whole=masters.direct or not rule.elementwise):
            weights = masters.read(part)
            rule.apply(update, decay, weights, local.own_grads[part], *(state[part] for state in states.values()), **given)
            masters.write(part, weights)

    def tensors(self) -> dict[str, dict[str, tuple[ParamSpec, torch.Tensor]]]:
        """Kind (weights, exp_avg, ...) -> logical name -> (spec, this rank's slice, whole): weights at master precision, frozen ones
        too, and the states (collective).

        For tests and comparisons: at ZeRO stage 0 without BF16 views, else copies. `portions` has what a checkpoint needs.
        """
        flat = self.flat
        masters = dict(zip(flat.trained, self.masters, strict=True))
        weights = [(b, masters[b].read(slice(None)) if b in masters else b.own_weights) for b in flat.buckets]
        found = {"weights": flat.whole(weights)}
        for kind in self.kinds:
            found[kind] = flat.whole((b, of[kind]) for b, of in zip(flat.trained, self.states, strict=True) if kind in of)
        return found

    def refresh(self) -> None:
        """Let other ranks have what was written into the masters of this one's shards, and into frozen weights."""
        for local in self.flat.buckets:
            self.flat.publish(local)


def _blocks(buffer: torch.Tensor, whole: bool) -> Iterator[slice]:
    """The elements of a buffer in blocks; in one where there is only one operation to do."""
    size = buffer.numel() if whole else GPU_BLOCK if buffer.is_cuda else BLOCK
    for start in range(0, buffer.numel(), max(size, 1)):
        yield slice(start, start + size)


# --- the global gradient norm: every logical element counted once, whatever the layout --------------------------------------


def local_squared_norm(flat: FlatParameters, ctx: ParallelContext) -> torch.Tensor:
    """This rank's share of the squared gradient norm: float64 scalar, to be summed over the world.

    A rank looks at the gradients that it owns. Of ranks that own the same elements (replicas of a shard, copies over tp, tied
    ends) the first one counts them; padding is zero. The others multiply by zero, which leaves NaN for a copy that is not finite: no rank
    may update what another one skips.
    """
    if not flat.owned:
        return torch.zeros((), dtype=torch.float64, device=ctx.device)
    counts = torch.tensor([float(shard.counts) for shard in flat.owned], dtype=torch.float64)
    found, owners = squares([shard.gradient for shard in flat.owned])
    (mine,) = to_device([counts[owners]], ctx.device)
    return (found * mine).sum()


def squares(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
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


def clip_divisor(norm: torch.Tensor, clip_grad: float) -> torch.Tensor:
    """The number to divide gradients by so that their norm is at most `clip_grad` (0: never clip): at least 1; float64 scalar tensor.

    As torch.nn.utils.clip_grad_norm_, whose 1e-6 keeps curves comparable.
    """
    if clip_grad == 0:
        return torch.ones_like(norm)
    return ((norm + 1e-6) / clip_grad).clamp_min(1.0)


class LossScale:
    """Dynamic loss scaling for FP16 (Micikevicius et al., arXiv:1710.03740, section 3.2); in every other precision the scale is 1.

    FP16 has 5 bits of exponent: gradients below 6e-8 vanish. So the loss is multiplied by a scale before the backward, and gradients are
    divided by it before the update. The scale is as large as it can be: it doubles after `window` updates without an overflow, and halves
    at overflows once `hysteresis` of them have come without such a window between. A step that overflowed anywhere changes no weight on
    any rank: whether it did is known from the one all-reduce of the step, so the scale is the same on all ranks. Scale and counters are
    on the device, so that the host need not wait to know of an overflow.
    """

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
        scale = torch.where(over & (left <= 0), (scale / 2).clamp_min(self.least), torch.where(grow, scale * 2, scale))
        self._state = torch.stack([scale, torch.where(grow, 0.0, good), torch.where(grow, float(self.hysteresis), left)])

    def state(self) -> list[float]:
        """The numbers that a checkpoint keeps: scale, updates since the last overflow or growth, overflows left."""
        return [float(value) for value in self._state.tolist()]

    def restore(self, state: list[float]) -> None:
        """Go on from an FP16 checkpoint, within the bounds of now."""
        if self.dynamic:
            scale, good, left = state
            bounded = [max(scale, self.least), good, min(left, self.hysteresis)]
            self._state = torch.tensor(bounded, dtype=torch.float64, device=self._state.device)
