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

How activations lie between the pairs is a value, `mesh.Rows`: a layer here enters all rows, and leaves with its own.

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
from typing import Any, NamedTuple

import torch
from torch import nn

from megatrain.kernels.beside import beside
from megatrain.kernels.matmul import linear, matmul
from megatrain.parallel.mesh import Done, Rows
from megatrain.parallel.param import (
    ZEROS,
    Init,
    ParamSpec,
    Part,
    Place,
    Postponed,
    Split,
    add_bias_gradient,
    add_weight_gradient,
    bias_proxy,
    joined,
    make_parameters,
)
from megatrain.transport.group import Handle

Remake = Callable[[], torch.Tensor]
"""Makes a tensor again that was not kept."""


class Backward(NamedTuple):
    """How the backward pass of a linear layer goes."""

    postponed: Postponed | None = None
    """Where its weight gradients are put, to be computed later; None: at once."""
    remake: Remake | None = None
    """Makes its input again, which is then not kept."""
    sums_bias: bool = True
    """Whether the biases' gradient is made here; else by who makes that of the output, for `bias_proxy`."""


AT_ONCE = Backward()


class _Linear(NamedTuple):
    """A linear function: its layout, its parameters and how its backward goes."""

    rows: Rows
    weights: Sequence[nn.Parameter]
    biases: Sequence[nn.Parameter]
    how: Backward

    def weight(self) -> torch.Tensor:
        """[sum of out, in], one matrix."""
        return joined(self.weights)

    def kept(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The input, where it is saved for the backward."""
        return (x,) if self.how.remake is None else ()

    def input(self, saved: Sequence[torch.Tensor]) -> torch.Tensor:
        """The input, as it was saved or made again; without a gradient."""
        if self.how.remake is None:
            return saved[0]
        with torch.no_grad():
            return self.how.remake()

    def bias_gradients(self, dy: torch.Tensor) -> list[torch.Tensor | None]:
        """Gradients of the biases, from dy [tokens, out], as autograd is to have them."""
        return add_bias_gradient(self.biases, dy) if self.how.sums_bias else [None] * len(self.biases)

    def weight_gradients(self, compute: Callable[[], list[torch.Tensor | None]]) -> list[torch.Tensor | None]:
        """The gradients that `compute` returns; or None for each parameter, and `compute` waits until its turn comes."""
        if self.how.postponed is None:
            return compute()
        self.how.postponed.append(lambda: _compute_late(compute, self.weights[0]))
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
        bias = joined(layer.biases) if layer.biases else None
        y = linear(layer.rows.enter(x), layer.weight(), bias)
        return tuple(y.split([w.shape[0] for w in layer.weights], dim=-1)) if len(layer.weights) > 1 else (y,)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> Any:
        layer: _Linear = ctx.layer
        saved = ctx.saved_tensors
        dy = beside(dys).flatten(0, 1)
        begun = layer.rows.start_enter(layer.input(saved)) if layer.how.postponed is None else None
        dx: torch.Tensor | None = None
        leaving: Handle = Done()
        if ctx.needs_input_grad[0]:
            partial = matmul(dy, layer.weight()).view(-1, *ctx.shape[1:])  # beside the gather
            dx, leaving = layer.rows.start_leave(partial)

        def weights() -> list[torch.Tensor | None]:
            whole, entering = begun or layer.rows.start_enter(layer.input(saved))
            entering.wait()
            grads = add_weight_gradient(layer.weights, dy, whole.flatten(0, 1))
            return grads + layer.bias_gradients(dy)

        grads = layer.weight_gradients(weights)  # beside the reduction
        leaving.wait()
        return dx, None, *grads


class _RowLinear(torch.autograd.Function):
    """x [s, b, in/t] -> [s/t or s, b, out]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: _Linear, *_parameters: torch.Tensor) -> torch.Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        ctx.save_for_backward(*layer.kept(x))
        # The bias is added once: by the first rank, inside its matmul, before the partial results are summed.
        bias = layer.biases[0].detach() if layer.biases and layer.rows.tp.rank == 0 else None
        return layer.rows.leave(linear(x, layer.weight(), bias))

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        layer: _Linear = ctx.layer
        saved = ctx.saved_tensors
        whole, entering = layer.rows.start_enter(dy)
        bias_grads = layer.bias_gradients(dy.flatten(0, 1))  # beside the gather
        entering.wait()
        whole = whole.flatten(0, 1)
        dx = matmul(whole, layer.weight()).view(ctx.shape) if ctx.needs_input_grad[0] else None
        grads = layer.weight_gradients(lambda: add_weight_gradient(layer.weights, whole, layer.input(saved).flatten(0, 1)))
        return dx, None, *grads[: len(layer.weights)], *bias_grads


def column_linear(
    x: torch.Tensor,
    weights: Sequence[nn.Parameter],
    biases: Sequence[nn.Parameter],
    rows: Rows,
    how: Backward = AT_ONCE,
) -> tuple[torch.Tensor, ...]:
    """x W_i^T + b_i for every weight: x [s/t or s, b, in], as `rows` lie -> each [s, b, out_i/t]."""
    return _ColumnLinear.apply(x, _Linear(rows, weights, biases, how), *weights, *biases)


class Matrix(NamedTuple):
    """One logical matrix of a linear layer, [outputs, inputs]."""

    name: str
    inputs: int
    outputs: int
    units: int
    """Indivisible pieces (heads, columns) of the dim that is split over tp: fewer than ranks are replicated over neighbouring ones."""
    init: Init = Init()


class ColumnParallelLinear(nn.Module):
    """Several outputs of one input, each split over the ranks by output columns: q|k|v by heads, gate|up by columns.

    An output with fewer units than ranks is replicated over neighbouring ranks, and its gradient summed over them.
    """

    def __init__(self, matrices: Sequence[Matrix], place: Place, *, bias: bool, part: Part = "other") -> None:
        super().__init__()
        self.rows = place.rows
        weights, biases = [], []
        for name, inputs, outputs, units, init in matrices:
            split = Split(0, units)
            # Replicas of one key head serve different query heads: their gradients are partial sums.
            partial = "tp" if split.copies(place.tp.size) > 1 else None
            weights.append(ParamSpec(f"{name}.weight", (outputs, inputs), split, partial, init=init, part=part))
            biases.append(ParamSpec(f"{name}.bias", (outputs,), split, partial, decay=False, init=ZEROS, part=part))
        self.weights = nn.ParameterList(make_parameters(weights, place))
        self.biases = nn.ParameterList(make_parameters(biases, place) if bias else [])

    def bias_proxy(self) -> torch.Tensor | None:
        """Takes the gradient of all biases, [sum of out/t], from who makes the outputs' gradients; None without biases."""
        return bias_proxy(tuple(self.biases)) if self.biases else None

    def forward(self, x: torch.Tensor, how: Backward = AT_ONCE) -> tuple[torch.Tensor, ...]:
        """[s/t or s, b, in] -> one [s, b, out/t] per output."""
        return column_linear(x, tuple(self.weights), tuple(self.biases), self.rows, how)


class RowParallelLinear(nn.Module):
    """One output, its inputs split over the ranks: x [s, b, in/t] -> [s/t, b, out] with sequence parallelism, else [s, b, out]."""

    def __init__(self, matrix: Matrix, place: Place, *, bias: bool, part: Part = "other") -> None:
        super().__init__()
        self.rows = place.rows
        name, inputs, outputs, units, init = matrix
        spec = ParamSpec(f"{name}.weight", (outputs, inputs), Split(1, units), init=init, part=part)
        self.weight = make_parameters([spec], place)[0]
        partial = self.rows.partial_over
        spec = ParamSpec(f"{name}.bias", (outputs,), None, partial, decay=False, init=ZEROS, part=part)
        self.biases = nn.ParameterList(make_parameters([spec], place) if bias else [])

    def bias_proxy(self) -> torch.Tensor | None:
        """Takes the gradient of the bias, [out], summed over this rank's rows, from who makes the output's; None without a bias."""
        return bias_proxy(tuple(self.biases)) if self.biases else None

    def forward(self, x: torch.Tensor, how: Backward = AT_ONCE) -> torch.Tensor:
        """[s, b, in/t] -> [s/t or s, b, out]."""
        biases = tuple(self.biases)
        return _RowLinear.apply(x, _Linear(self.rows, (self.weight,), biases, how), self.weight, *biases)
