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

from megatrain.kernels.matmul import add_matmul, linear, matmul
from megatrain.parallel.collectives import (
    Done,
    all_reduce,
    gathered,
    scatter_summed,
    start_all_reduce,
    start_gather,
    start_scatter_sum,
)
from megatrain.parallel.mesh import Axis
from megatrain.parallel.param import Init, Parameter, ParamSpec, Split
from megatrain.parallel.transport import Handle
from megatrain.parallel.weights import Postponed, add_bias_gradient, add_weight_gradient, joined, make_parameters

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
        whole = gathered(x, layer.tp) if layer.sequence_parallel else x
        bias = joined(layer.biases) if layer.biases else None
        y = linear(whole, layer.weight(), bias)
        return tuple(y.split([w.shape[0] for w in layer.weights], dim=-1)) if len(layer.weights) > 1 else (y,)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> Any:
        layer: _Linear = ctx.layer
        saved = ctx.saved_tensors
        dy = (dys[0] if len(dys) == 1 else torch.cat(dys, dim=-1)).flatten(0, 1)

        def gather_input() -> tuple[torch.Tensor, Handle]:
            x = layer.input(saved)
            return start_gather(x, layer.tp) if layer.sequence_parallel else (x, Done())

        begun = gather_input() if layer.postponed is None else None
        dx: torch.Tensor | None = None
        reduce: Handle = Done()
        if ctx.needs_input_grad[0]:
            partial = matmul(dy, layer.weight()).view(-1, *ctx.shape[1:])  # beside the gather
            start = start_scatter_sum if layer.sequence_parallel else start_all_reduce
            dx, reduce = start(partial, layer.tp)

        def weights() -> list[torch.Tensor | None]:
            whole, gather = begun or gather_input()
            gather.wait()
            grads = add_weight_gradient(layer.weights, dy, whole.flatten(0, 1))
            return grads + (add_bias_gradient(layer.biases, dy) if layer.biases else [])

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
        return scatter_summed(partial, layer.tp) if layer.sequence_parallel else all_reduce(partial, layer.tp)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        layer: _Linear = ctx.layer
        saved = ctx.saved_tensors
        whole, gather = start_gather(dy, layer.tp) if layer.sequence_parallel else (dy, Done())
        bias_grads = add_bias_gradient(layer.biases, dy.flatten(0, 1)) if layer.biases else []  # beside the gather
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
) -> tuple[torch.Tensor, ...]:
    """x W_i^T + b_i for every weight: x [s/t, b, in] with sequence parallelism, else [s, b, in] -> each [s, b, out_i/t].

    postponed: where the weight gradients are put, to be computed later. remake: makes x again for them, so that it is not kept.
    """
    return _ColumnLinear.apply(x, _Linear(tp, sequence_parallel, weights, biases, postponed, remake), *weights, *biases)


class Linears(TypedDict):
    """What the linear layers of one model are built with alike."""

    bias: bool
    sequence_parallel: bool
    dtype: torch.dtype
    device: torch.device


class ColumnParallelLinear(nn.Module):
    """Several outputs of one input, each split over the ranks by output columns: q|k|v by heads, gate|up by columns.

    `outputs` is a list of (logical name, out features, indivisible units): out features are cut into units (heads); an output
    with fewer units than ranks is replicated over neighbouring ranks, and its gradient summed over them.
    """

    def __init__(
        self,
        outputs: Sequence[tuple[str, int, int]],
        in_features: int,
        tp: Axis,
        *,
        bias: bool,
        sequence_parallel: bool,
        init: Init,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel
        weights, biases = [], []
        for name, size, units in outputs:
            split = Split(0, units)
            # Replicas of one key head serve different query heads: their gradients are partial sums.
            partial = "tp" if split.copies(tp.size) > 1 else None
            weights.append(ParamSpec(f"{name}.weight", (size, in_features), split, partial, init=init))
            biases.append(ParamSpec(f"{name}.bias", (size,), split, partial, decay=False, init=Init("constant", 0.0)))
        self.weights = nn.ParameterList(make_parameters(weights, tp, dtype, device))
        self.biases = nn.ParameterList(make_parameters(biases, tp, dtype, device) if bias else [])

    def forward(
        self, x: torch.Tensor, postponed: Postponed | None = None, remake: Callable[[], torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, ...]:
        """[s/t or s, b, in] -> one [s, b, out/t] per output."""
        weights, biases = tuple(self.weights), tuple(self.biases)
        return column_linear(x, weights, biases, self.tp, self.sequence_parallel, postponed, remake)


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
    ) -> None:
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel
        spec = ParamSpec(f"{name}.weight", (out_features, in_features), Split(1, units), init=init)
        self.weight = make_parameters([spec], tp, dtype, device)[0]
        self.biases = nn.ParameterList()
        if bias:
            partial = "tp" if sequence_parallel else None  # each rank adds up only its part of the sequence
            spec = ParamSpec(f"{name}.bias", (out_features,), None, partial, decay=False, init=Init("constant", 0.0))
            self.biases = nn.ParameterList(make_parameters([spec], tp, dtype, device))

    def forward(
        self, x: torch.Tensor, postponed: Postponed | None = None, remake: Callable[[], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """[s, b, in/t] -> [s/t or s, b, out]."""
        biases = tuple(self.biases)
        layer = _Linear(self.tp, self.sequence_parallel, (self.weight,), biases, postponed, remake)
        return _RowLinear.apply(x, layer, self.weight, *biases)


# --- vocabulary -------------------------------------------------------------------------------------------------------


class _Embedding(torch.autograd.Function):
    """tokens [s, b] -> [s/t or s, b, h]: each rank looks up the ids of its rows, zeros elsewhere, then a sum."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, tokens: torch.Tensor, first: int, tp: Axis, sequence_parallel: bool
    ) -> torch.Tensor:
        local = tokens - first
        here = (local >= 0) & (local < weight.shape[0])
        local = torch.where(here, local, 0)
        ctx.save_for_backward(local, here)
        ctx.weight, ctx.tp, ctx.sequence_parallel = weight, tp, sequence_parallel
        partial = nn.functional.embedding(local, weight) * here.unsqueeze(-1)
        return scatter_summed(partial, tp) if sequence_parallel else all_reduce(partial, tp)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        local, here = ctx.saved_tensors
        whole = gathered(dy, ctx.tp) if ctx.sequence_parallel else dy
        whole = (whole * here.unsqueeze(-1)).flatten(0, 1)
        out = getattr(ctx.weight, "main_grad", None)
        target = torch.zeros_like(ctx.weight) if out is None else out
        target.index_add_(0, local.flatten(), whole.to(target.dtype))
        return (target if out is None else None), None, None, None, None


class VocabParallelEmbedding(nn.Module):
    """Token embedding [v, h], its rows split over the ranks; a vocabulary that does not divide is padded inside the rank only."""

    def __init__(
        self,
        name: str,
        vocab_size: int,
        hidden: int,
        tp: Axis,
        *,
        sequence_parallel: bool,
        init: Init,
        dtype: torch.dtype,
        device: torch.device,
        tied: str | None = None,
    ) -> None:
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel
        self.weight = vocab_parameter(name, vocab_size, hidden, tp, init, dtype, device, tied)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[s, b] int64 -> [s/t, b, h] with sequence parallelism, else [s, b, h]."""
        first = self.tp.rank * self.weight.shape[0]
        return _Embedding.apply(self.weight, tokens, first, self.tp, self.sequence_parallel)


def vocab_parameter(
    name: str,
    vocab_size: int,
    hidden: int,
    tp: Axis,
    init: Init,
    dtype: torch.dtype,
    device: torch.device,
    tied: str | None = None,
) -> Parameter:
    """A [v, h] parameter split by rows over tp, padded where v does not divide. tied: axis whose ranks hold a copy each."""
    spec = ParamSpec(name, (vocab_size, hidden), Split(0, vocab_size, pad=True), tied=tied, init=init)
    return make_parameters([spec], tp, dtype, device)[0]


class _Logits(torch.autograd.Function):
    """x [s/t or s, b, h] -> this rank's logits [s, b, v_local] over the logical rows of `weight` alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, rows: int, tp: Axis, sequence_parallel: bool) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.rows, ctx.tp, ctx.sequence_parallel = weight, rows, tp, sequence_parallel
        whole = gathered(x, tp) if sequence_parallel else x
        return linear(whole, weight[:rows])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        weight, rows = ctx.weight, ctx.rows
        dy = dy.flatten(0, 1)
        whole, gather = start_gather(x, ctx.tp) if ctx.sequence_parallel else (x, Done())
        partial = matmul(dy, weight[:rows]).view(-1, *x.shape[1:])
        start = start_scatter_sum if ctx.sequence_parallel else start_all_reduce
        dx, reduce = start(partial, ctx.tp)
        gather.wait()
        out = getattr(weight, "main_grad", None)
        target = torch.zeros_like(weight) if out is None else out
        add_matmul(target[:rows], dy.t(), whole.flatten(0, 1))
        reduce.wait()
        return dx, (target if out is None else None), None, None, None


def vocab_parallel_logits(x: torch.Tensor, weight: Parameter, tp: Axis, sequence_parallel: bool) -> torch.Tensor:
    """x [s/t or s, b, h] -> logits [s, b, v_local] of the ids this rank holds; padding rows never become logits."""
    first, last = _vocab_range(weight, tp)
    return _Logits.apply(x, weight, last - first, tp, sequence_parallel)


def _vocab_range(weight: Parameter, tp: Axis) -> tuple[int, int]:
    rows = weight.spec.slices(tp.size, tp.rank)[0]
    return rows.start, rows.stop


class _CrossEntropy(torch.autograd.Function):
    """logits [s, b, v_local] -> (loss [s, b], correct [s, b]); the logits become their exponentials, then their gradient, in place."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, first: int, tp: Axis
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = logits.detach().flatten(0, 1)
        local = labels.flatten() - first
        here = (local >= 0) & (local < rows.shape[1])
        local = torch.where(here, local, 0)
        top, total, target = _exponentials(rows, local, here)
        highest = all_reduce(top.clone(), tp, "max")
        share = torch.exp(top - highest)
        total, target = all_reduce(torch.stack([total * share, target]), tp)
        loss = torch.log(total) + (highest - target)  # in this order: a large logit would swallow the logarithm
        ctx.save_for_backward(rows, local, here, share / total, loss)
        ctx.shape = logits.shape
        correct = target >= highest
        ctx.mark_non_differentiable(correct)
        return loss.view(labels.shape), correct.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor, _dcorrect: torch.Tensor) -> Any:
        rows, local, here, to_probability, loss = ctx.saved_tensors
        scale = dloss.flatten().to(to_probability.dtype)
        if rows.shape[1]:
            rows.mul_((to_probability * scale)[:, None].to(rows.dtype))
            # p - 1 of the label from the loss: of a rounded p near 1 little would be left.
            label = (torch.expm1(-loss) * scale).to(rows.dtype)[:, None]
            rows.scatter_(1, local[:, None], torch.where(here[:, None], label, rows.gather(1, local[:, None])))
        return rows.view(ctx.shape), None, None, None


def _exponentials(
    rows: torch.Tensor, local: torch.Tensor, here: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turn logits [n, v_local] into exp(x - largest of the row), in place.

    Returns of each row its largest value, the sum of its exponentials, and the label's logit (0 if elsewhere), in at least
    float32. A rank without any id of a tiny vocabulary contributes -inf and 0.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    top = torch.full((rows.shape[0],), -torch.inf, dtype=dtype, device=rows.device)
    total, target = torch.zeros_like(top), torch.zeros_like(top)
    if rows.shape[1] == 0:
        return top, total, target
    for block in _row_blocks(rows):
        x = rows[block].to(dtype)
        target[block] = x.gather(1, local[block, None]).squeeze(1) * here[block]
        top[block] = x.amax(1)
        x = x.sub_(top[block, None]).exp_()  # where the dtype is the same, x is the block itself
        total[block] = x.sum(1)
        rows[block] = x
    return top, total, target


def _row_blocks(rows: torch.Tensor) -> list[slice]:
    """Blocks of rows whose float32 copies stay in a CPU's cache; one block on a GPU."""
    size = rows.shape[0] if rows.is_cuda else max(1, 2**19 // max(1, rows.shape[1]))
    return [slice(start, start + size) for start in range(0, rows.shape[0], size)]


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weight: Parameter, tp: Axis
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy over logits that stay split: [s, b, v_local], labels [s, b] -> (loss [s, b] in nats, correct [s, b] bool).

    At least float32 inside. Two small all-reduces of [s, b]: the largest logit, then the sum of exponentials and the label's
    logit. `correct`: no logit is larger than the label's. `logits` are used up: do not read them afterwards.
    """
    first, _ = _vocab_range(weight, tp)
    return _CrossEntropy.apply(logits, labels, first, tp)
