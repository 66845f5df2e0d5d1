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

from collections.abc import Iterator
from typing import Literal

import torch

from megatrain.config.schema import OptimConfig
from megatrain.kernels.adamw import AdamRates, adam_reference, adam_triton
from megatrain.kernels.dispatch import Kernels, use_triton
from megatrain.kernels.split_float import join_float, round_to_bf16, split_float
from megatrain.optim.sgd import sgd_step
from megatrain.parallel.flat import Held
from megatrain.parallel.param import ParamSpec
from megatrain.parallel.portion import Cut, Elements, Plain, Portion, Window
from megatrain.parallel.zero import FlatParameters

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
