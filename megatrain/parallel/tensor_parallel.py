"""Tensor and sequence parallelism: the matrices of a layer lie on t ranks (Megatron, arXiv:1909.08053; arXiv:2205.05198).

Problem: one layer's weights, or their matmuls, are too much for one device. Cut the first matrix of each pair by columns and the
second by rows; then only the pair's end needs a sum. Four ranks, MLP [h] -> [f] -> [h]; x whole on each rank:

    rank 0   x --> W1[0:f/4] --> act --> W2[:, 0:f/4]  --> partial y0 \\
    rank 1   x --> W1[f/4..]  --> act --> W2[:, f/4..]  --> partial y1  > sum = y on all ranks
    rank 2   ...                                        --> partial y2 /
    rank 3   ...                                        --> partial y3 /
        column-parallel (no traffic)     row-parallel (one all-reduce)

Sequence parallelism splits what lies between the pairs (norms, dropout, residuals: activations [s/t, b, h]) along the sequence:
the sum becomes a reduce-scatter, and an all-gather stands before the column-parallel matrix. Same bytes, 1/t of the activations.

Communication, per layer and micro-batch, in units of s*b*h elements times (t-1)/t moved per rank: without sequence parallelism
4 all-reduces (2 forward, 2 backward) = 8; with it, forward 2 gathers + 2 scatters, backward 2 + 2 and 2 more gathers of the
column-parallel inputs, which were not kept whole = 10. In the backward, gathers and scatters run beside matmuls.

Weights are [out, in] as in torch; y = x W^T + b. Several outputs of one input (q|k|v, gate|up) are separate parameters that lie
behind one another in memory, so that one matmul computes them all. Gradients are added straight into `main_grad` where a
parameter has one; otherwise they are returned to autograd, so the layers can be tested and used on their own. Under a split
backward (zero-bubble schedules) the weight gradient of a linear layer is put on the list `postponed` instead, and gathers its
input when its turn comes. Norms, embedding and head add theirs at once: the first two cost little, and the third would have to keep
gradients of logits, v/h times as large as anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import nn

from megatrain.kernels.beside import beside
from megatrain.kernels.matmul import linear, matmul
from megatrain.parallel.mesh import (
    Axis,
    Done,
)
from megatrain.parallel.param import (
    Init,
    ParamSpec,
    Part,
    Postponed,
    Split,
    add_bias_gradient,
    add_weight_gradient,
    bias_place,
    joined,
    make_parameters,
)
from megatrain.transport.group import Handle

# --- linear layers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Linear:
    """What a linear function needs besides tensors: the axis, the layout of its activations and its parameters."""

    tp: Axis
    sequence_parallel: bool
    weights: Sequence[nn.Parameter]
    biases: Sequence[nn.Parameter]
    postponed: Postponed | None = None
    remake: Callable[[], torch.Tensor] | None = None
    """Makes the input again, which is then not kept."""
    sums_bias: bool = True
    """Whether the biases' gradient is made here, and not by who makes that of the output (`bias_place`)."""

    def weight(self) -> torch.Tensor:
        """[sum of out, in], one matrix."""
        return joined(self.weights)

    def kept(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What to save of the input."""
        return (x,) if self.remake is None else ()

    def input(self, saved: Sequence[torch.Tensor]) -> torch.Tensor:
        """The input, as it was saved or made again; without a gradient."""
        if self.remake is None:
            return saved[0]
        with torch.no_grad():
            return self.remake()

    def bias_gradients(self, dy: torch.Tensor) -> list[torch.Tensor | None]:
        """Of the biases, from dy [tokens, out]: for autograd, what it shall have."""
        return add_bias_gradient(self.biases, dy) if self.sums_bias else [None] * len(self.biases)

    def weight_gradients(self, compute: Callable[[], list[torch.Tensor | None]]) -> list[torch.Tensor | None]:
        """What `compute` returns for autograd; or nothing, and `compute` waits until its turn comes."""
        if self.postponed is None:
            return compute()
        self.postponed.append(lambda: _compute_late(compute, self.weights[0]))
        return [None] * (len(self.weights) + len(self.biases))


def _compute_late(compute: Callable[[], list[torch.Tensor | None]], weight: nn.Parameter) -> None:
    """Run postponed work. Raises ValueError where there is no main_grad to add to: autograd is over by now."""
    if any(gradient is not None for gradient in compute()):
        raise ValueError(
            f"a postponed weight gradient of shape {list(weight.shape)} needs a main_grad, and the parameter has none"
        )


class _ColumnLinear(torch.autograd.Function):
    """x [s/t or s, b, in] -> one [s, b, out_i / t] per weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: _Linear, *_parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.layer, ctx.shape = layer, x.shape
        ctx.save_for_backward(*layer.kept(x))
        whole = layer.tp.gathered(x) if layer.sequence_parallel else x
        bias = joined(layer.biases) if layer.biases else None
        y = linear(whole, layer.weight(), bias)
        return tuple(y.split([w.shape[0] for w in layer.weights], dim=-1)) if len(layer.weights) > 1 else (y,)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> Any:
        layer: _Linear = ctx.layer
        saved = ctx.saved_tensors
        dy = beside(dys).flatten(0, 1)

        def gather_input() -> tuple[torch.Tensor, Handle]:
            x = layer.input(saved)
            return layer.tp.start_gather(x) if layer.sequence_parallel else (x, Done())

        begun = gather_input() if layer.postponed is None else None
        dx: torch.Tensor | None = None
        reduce: Handle = Done()
        if ctx.needs_input_grad[0]:
            partial = matmul(dy, layer.weight()).view(-1, *ctx.shape[1:])  # beside the gather
            start = layer.tp.start_scatter_sum if layer.sequence_parallel else layer.tp.start_all_reduce
            dx, reduce = start(partial)

        def weights() -> list[torch.Tensor | None]:
            whole, gather = begun or gather_input()
            gather.wait()
            grads = add_weight_gradient(layer.weights, dy, whole.flatten(0, 1))
            return grads + layer.bias_gradients(dy)

        grads = layer.weight_gradients(weights)  # beside the reduction
        reduce.wait()
        return dx, None, *grads


class _RowLinear(torch.autograd.Function):
    """x [s, b, in/t] -> [s/t or s, b, out]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: _Linear, *_parameters: torch.Tensor) -> torch.Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        ctx.save_for_backward(*layer.kept(x))
        # The bias is added once: by the first rank, inside its matmul, before the partial results are summed.
        bias = layer.biases[0].detach() if layer.biases and layer.tp.rank == 0 else None
        partial = linear(x, layer.weight(), bias)
        return layer.tp.scatter_summed(partial) if layer.sequence_parallel else layer.tp.all_reduce(partial)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        layer: _Linear = ctx.layer
        saved = ctx.saved_tensors
        whole, gather = layer.tp.start_gather(dy) if layer.sequence_parallel else (dy, Done())
        bias_grads = layer.bias_gradients(dy.flatten(0, 1))  # beside the gather
        gather.wait()
        whole = whole.flatten(0, 1)
        dx = matmul(whole, layer.weight()).view(ctx.shape) if ctx.needs_input_grad[0] else None
        grads = layer.weight_gradients(lambda: add_weight_gradient(layer.weights, whole, layer.input(saved).flatten(0, 1)))
        return dx, None, *grads[: len(layer.weights)], *bias_grads


def column_linear(
    x: torch.Tensor,
    weights: Sequence[nn.Parameter],
    biases: Sequence[nn.Parameter],
    tp: Axis,
    sequence_parallel: bool,
    postponed: Postponed | None = None,
    remake: Callable[[], torch.Tensor] | None = None,
    sums_bias: bool = True,
) -> tuple[torch.Tensor, ...]:
    """x W_i^T + b_i for every weight: x [s/t, b, in] with sequence parallelism, else [s, b, in] -> each [s, b, out_i/t].

    postponed: where the weight gradients are put, to be computed later. remake: makes x again for them, so that it is not kept.
    sums_bias: whether the gradient of the biases is made here; else by who makes that of the output (`bias_place`).
    """
    layer = _Linear(tp, sequence_parallel, weights, biases, postponed, remake, sums_bias)
    return _ColumnLinear.apply(x, layer, *weights, *biases)


class Linears(TypedDict):
    """What the linear layers of one part of a model are built with alike."""

    part: Part
    bias: bool
    sequence_parallel: bool
    dtype: torch.dtype
    device: torch.device


class ColumnParallelLinear(nn.Module):
    """Several outputs of one input, each split over the ranks by output columns: q|k|v by heads, gate|up by columns.

    `outputs` is a list of (logical name, out features, indivisible units): out features are cut into units (heads); an output
    with fewer units than ranks is replicated over neighbouring ranks, and its gradient summed over them. `init`: of all of them,
    or of each.
    """

    def __init__(
        self,
        outputs: Sequence[tuple[str, int, int]],
        in_features: int,
        tp: Axis,
        *,
        bias: bool,
        sequence_parallel: bool,
        init: Init | Sequence[Init],
        dtype: torch.dtype,
        device: torch.device,
        part: Part = "other",
    ) -> None:
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel
        weights, biases = [], []
        inits = [init] * len(outputs) if isinstance(init, Init) else init
        for (name, size, units), of in zip(outputs, inits, strict=True):
            split = Split(0, units)
            # Replicas of one key head serve different query heads: their gradients are partial sums.
            partial = "tp" if split.copies(tp.size) > 1 else None
            weights.append(ParamSpec(f"{name}.weight", (size, in_features), split, partial, init=of, part=part))
            zero = Init("constant", 0.0)
            biases.append(ParamSpec(f"{name}.bias", (size,), split, partial, decay=False, init=zero, part=part))
        self.weights = nn.ParameterList(make_parameters(weights, tp, dtype, device))
        self.biases = nn.ParameterList(make_parameters(biases, tp, dtype, device) if bias else [])

    def bias_place(self) -> torch.Tensor | None:
        """Where who makes the outputs' gradients gives that of all biases, [sum of out/t]; None without biases."""
        return bias_place(tuple(self.biases)) if self.biases else None

    def forward(
        self,
        x: torch.Tensor,
        postponed: Postponed | None = None,
        remake: Callable[[], torch.Tensor] | None = None,
        sums_bias: bool = True,
    ) -> tuple[torch.Tensor, ...]:
        """[s/t or s, b, in] -> one [s, b, out/t] per output. sums_bias: False where `bias_place` is given the biases' gradient."""
        weights, biases = tuple(self.weights), tuple(self.biases)
        return column_linear(x, weights, biases, self.tp, self.sequence_parallel, postponed, remake, sums_bias)


class RowParallelLinear(nn.Module):
    """One output, its inputs split over the ranks: x [s, b, in/t] -> [s/t, b, out] with sequence parallelism, else [s, b, out]."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        units: int,
        tp: Axis,
        *,
        bias: bool,
        sequence_parallel: bool,
        init: Init,
        dtype: torch.dtype,
        device: torch.device,
        part: Part = "other",
    ) -> None:
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel
        spec = ParamSpec(f"{name}.weight", (out_features, in_features), Split(1, units), init=init, part=part)
        self.weight = make_parameters([spec], tp, dtype, device)[0]
        self.biases = nn.ParameterList()
        if bias:
            partial = "tp" if sequence_parallel else None  # each rank adds up only its part of the sequence
            zero = Init("constant", 0.0)
            spec = ParamSpec(f"{name}.bias", (out_features,), None, partial, decay=False, init=zero, part=part)
            self.biases = nn.ParameterList(make_parameters([spec], tp, dtype, device))

    def bias_place(self) -> torch.Tensor | None:
        """Where who makes the output's gradient gives that of the bias, [out], summed over the rows it has; None without a bias."""
        return bias_place(tuple(self.biases)) if self.biases else None

    def forward(
        self,
        x: torch.Tensor,
        postponed: Postponed | None = None,
        remake: Callable[[], torch.Tensor] | None = None,
        sums_bias: bool = True,
    ) -> torch.Tensor:
        """[s, b, in/t] -> [s/t or s, b, out]. sums_bias: False where `bias_place` is given the bias's gradient."""
        biases = tuple(self.biases)
        layer = _Linear(self.tp, self.sequence_parallel, (self.weight,), biases, postponed, remake, sums_bias)
        return _RowLinear.apply(x, layer, self.weight, *biases)
