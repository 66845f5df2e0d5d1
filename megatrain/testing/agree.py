"""`agree`: do two layouts train the same model? Compares two `Trace`s and names the first step and tensor that differ.

| compared                             | deviation                                | float64 | float32        |
| ------------------------------------ | ---------------------------------------- | ------- | -------------- |
| losses and gradient norms, each step | |a-b| / |b|                              | 1e-12   | 2e-5           |
| each gradient of the first step      | max|a-b| / max(max|b|, RMS of all)       | 1e-12   | 2e-5           |
| updated weights, optimizer states    | max|a-b| / max(max|b|, learning rate)    | 1e-8    | 2e-5, SGD only |

Adam divides rounding noise by itself where a gradient is exactly zero (a key bias), so in float32 its weights are not compared.
Where a config amplifies rounding, correct layouts deviate by more than these bounds. `control` then measures the amplification: runs of
one process with weights changed in their last place. Deviations up to MARGIN times theirs are no fault (docs/numerics.md).
In bfloat16 rounding is too coarse for a fixed tolerance: `agree_in_bf16` checks that a layout is not much worse than one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

Tensors = Mapping[str, torch.Tensor]

MARGIN = 32
"""A deviation may be this many times the control's, which rounds each weight once, while a sum of n terms is rounded n times: a factor
of up to sqrt(n). The largest factor seen is 2 to 3 (models of 16 to 64 features)."""


class Disagreement(AssertionError):
    """Two runs differ by more than rounding."""


@dataclass(frozen=True)
class Trace:
    """Results of a few training steps, as logical (whole, unpadded) tensors by logical name."""

    losses: Sequence[float]
    """Loss of each step."""
    grad_norms: Sequence[float]
    """Gradient norm of each step, before clipping."""
    gradients: Tensors
    """Gradients of the first step, before clipping."""
    weights: Tensors
    """Weights after the last step."""
    states: Mapping[str, Tensors] = field(default_factory=dict)
    """Optimizer states after the last step, by kind (exp_avg, ...)."""
    learning_rate: float = 0.0
    """Peak learning rate."""
    dtype: Literal["fp64", "fp32", "bf16", "fp16"] = "fp64"
    """Precision of the run."""


@dataclass(frozen=True)
class _Limit:
    """The largest deviation of one number or tensor that still counts as rounding."""

    bound: float
    moved: float
    """Deviation of the control."""

    @property
    def largest(self) -> float:
        return max(self.bound, MARGIN * self.moved)

    def __str__(self) -> str:
        if self.largest == self.bound:
            return f"{self.bound:g}"
        return f"{self.largest:.3g}, {MARGIN} times what a change of the weights in their last place makes"


@dataclass(frozen=True)
class Tolerance:
    """Bounds on deviations."""

    step: float
    """Bound for losses, gradient norms and gradients of the first step."""
    update: float | None
    """Bound for weights and optimizer states; None: these are not compared."""


def tolerance(dtype: str, optimizer: str) -> Tolerance:
    """The bounds for a precision and optimizer. Raises ValueError for a precision without fixed bounds."""
    if dtype == "fp64":
        return Tolerance(1e-12, 1e-8)
    if dtype == "fp32":
        return Tolerance(2e-5, 2e-5 if optimizer == "sgd" else None)
    raise ValueError(f"{dtype} has no fixed tolerance: compare in fp64 or fp32, or with agree_in_bf16")


def agree(reference: Trace, other: Trace, *, optimizer: str = "adamw", control: Sequence[Trace] = ()) -> dict[str, float]:
    """Check that `other` trained the same model as `reference`, up to rounding; `optimizer` is adamw, adam or sgd.

    control: traces of the reference's process with weights changed in their last place (`testing/control.py`); without any, only the
    bounds count. Returns the largest deviation of each kind (loss, grad_norm, gradient, weight, state). Raises Disagreement that names the
    first step and quantity or tensor that differ, with both values; ValueError if the two runs cannot be compared.
    """
    if reference.dtype != other.dtype:
        raise ValueError(f"a {reference.dtype} run cannot be compared with a {other.dtype} run: train both in fp64")
    allowed = tolerance(reference.dtype, optimizer)
    largest: dict[str, float] = {}
    if len(reference.losses) != len(other.losses) or len(reference.grad_norms) != len(other.grad_norms):
        raise Disagreement(f"the reference has {len(reference.losses)} steps, the other {len(other.losses)}")
    moved = {"loss": 0.0, "grad_norm": 0.0}  # largest of the control so far: one step's may be small by chance

    def scalar(kind: str, step: int, values: Callable[[Trace], Sequence[float]]) -> None:
        b = values(reference)[step]
        moved[kind] = _largest([moved[kind], *(_relative(values(trace)[step], b) for trace in control)])
        _scalar(largest, kind, step, values(other)[step], b, _Limit(allowed.step, moved[kind]))

    def tensors(kind: str, when: str, values: Callable[[Trace], Tensors], floor: float, bound: float) -> None:
        _tensors(largest, kind, when, values(other), values(reference), [values(trace) for trace in control], floor, bound)

    for step in range(len(reference.losses)):
        scalar("loss", step, lambda trace: trace.losses)
        if step == 0:  # before the norm, since a tensor's name tells more
            tensors("gradient", "of step 0", lambda trace: trace.gradients, _rms(reference), allowed.step)
        if step < len(reference.grad_norms):
            scalar("grad_norm", step, lambda trace: trace.grad_norms)
    if allowed.update is None:
        return largest
    after, floor = f"after step {len(reference.losses) - 1}", reference.learning_rate
    tensors("weight", after, lambda trace: trace.weights, floor, allowed.update)
    if set(reference.states) != set(other.states):
        raise Disagreement(f"optimizer states: reference has {sorted(reference.states)}, other {sorted(other.states)}")
    for name in reference.states:

        def of_kind(trace: Trace, name: str = name) -> Tensors:
            return trace.states[name]

        tensors("state", f"({name}) {after}", of_kind, floor, allowed.update)
    return largest


def agree_in_bf16(exact: Trace | Sequence[Trace], single: Trace | Sequence[Trace], other: Trace | Sequence[Trace]) -> None:
    """Check that a bfloat16 run `other` is as near to a float32 run of the same (bfloat16) weights as one process is.

    exact: float32, one process; single: bfloat16, one process. Loss and gradient norm of the first step may lie twice as far
    from `exact` as those of `single`, plus 1e-4 of their size. Raises Disagreement.

    Both distances are rounding noise around zero, and that of one process may be small by chance; about one good layout in ten would then
    fail. Give lists of runs, one for each of a dozen seeds: root mean squares over them are compared.
    """
    seeds = list(zip(*([runs] if isinstance(runs, Trace) else runs for runs in (exact, single, other)), strict=True))
    for name in ("losses", "grad_norms"):
        values = torch.tensor([[getattr(trace, name)[0] for trace in traces] for traces in seeds], dtype=torch.float64)
        truth, alone, ours = values.unbind(1)
        size, noise, distance = (v.square().mean().sqrt().item() for v in (truth, alone - truth, ours - truth))
        allowed = 2 * noise + 1e-4 * size
        if not distance <= allowed:  # written so that NaN disagrees
            shown = ", ".join(
                f"{value!r} ({reference!r} in float32, {lone!r} on one process)"
                for reference, lone, value in values.tolist()[:4]
            )
            raise Disagreement(f"step 0, {name}: {shown}: {distance:.3g} from float32, more than {allowed:.3g}")


def _rms(trace: Trace) -> float:
    """Root mean square of all gradients' elements: a floor for the size that a gradient's deviation is compared with."""
    squares = sum(float(g.double().square().sum()) for g in trace.gradients.values())
    return float((squares / max(1, sum(g.numel() for g in trace.gradients.values()))) ** 0.5)


def _relative(a: float, b: float) -> float:
    """Relative deviation of `a` from `b`."""
    return 0.0 if a == b else abs(a - b) / max(abs(b), 1e-300)


def _largest(deviations: Sequence[float]) -> float:
    """The largest finite deviation of the control; a deviation that is not finite excuses nothing."""
    return max((value for value in deviations if math.isfinite(value)), default=0.0)


def _scalar(largest: dict[str, float], kind: str, step: int, a: float, b: float, allowed: _Limit) -> None:
    """Compare one number of one step."""
    deviation = _relative(a, b)
    if not math.isfinite(b) and a != b:
        raise Disagreement(
            f"step {step}, {kind}: {a!r}, and {b!r} in the reference itself: nothing can be compared with a config that diverges. "
            "Use a smaller optim.lr or model.init_std, or fewer steps."
        )
    if not deviation <= allowed.largest:  # written so that NaN disagrees
        raise Disagreement(f"step {step}, {kind}: {a!r}, but the reference has {b!r}: deviation {deviation:.3g} > {allowed}")
    largest[kind] = max(largest.get(kind, 0.0), deviation)


def _tensors(
    largest: dict[str, float],
    kind: str,
    when: str,
    ours: Tensors,
    reference: Tensors,
    control: Sequence[Tensors],
    floor: float,
    bound: float,
) -> None:
    """Compare tensors by name. floor: the least size that a tensor's deviation is divided by."""
    if set(ours) != set(reference):
        odd = sorted(set(ours) ^ set(reference))
        raise Disagreement(f"{kind} {when}: only one of the two runs has {', '.join(odd[:8])} ({len(odd)} names)")
    wrong = []
    for name, b in reference.items():
        a = ours[name]
        if a.shape != b.shape:
            raise Disagreement(f"{kind} {when}: {name} is {list(a.shape)}, but {list(b.shape)} in the reference")
        deviation = _deviation(a, b, floor)
        allowed = _Limit(bound, _largest([_deviation(tensors[name], b, floor) for tensors in control]))
        if deviation <= allowed.largest:  # false for NaN
            largest[kind] = max(largest.get(kind, 0.0), deviation)
        else:
            wrong.append((name, deviation, allowed))
    if wrong:
        name, deviation, allowed = wrong[0]
        place = _place(ours[name], reference[name])
        others = f"; so do {', '.join(n for n, *_ in wrong[1:9])}" if len(wrong) > 1 else ""
        more = f" and {len(wrong) - 9} more" if len(wrong) > 9 else ""
        raise Disagreement(
            f"{kind} {when}: {name}{list(place)} is {ours[name][place].item()!r}, but the reference has "
            f"{reference[name][place].item()!r}: deviation {deviation:.3g} > {allowed}. "
            f"{len(wrong)} of {len(reference)} tensors deviate{others}{more}"
        )


def _deviation(a: torch.Tensor, b: torch.Tensor, floor: float) -> float:
    """max|a-b| / max(max|b|, floor); NaN where either has one."""
    if b.numel() == 0:
        return 0.0
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    worst = (a - b).abs().max().item()
    return 0.0 if worst == 0 else worst / max(b.abs().max().item(), floor, 1e-300)


def _place(a: torch.Tensor, b: torch.Tensor) -> tuple[int, ...]:
    """Index of the largest difference; of the first NaN, if there is one."""
    index = (a.detach().cpu().double() - b.detach().cpu().double()).abs().argmax()
    return tuple(int(i) for i in torch.unravel_index(index, b.shape))
