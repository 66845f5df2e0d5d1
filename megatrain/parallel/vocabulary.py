"""The vocabulary over tensor-parallel ranks: each holds the embedding and head rows of its ids, and logits stay split.

Problem: a head [v, h] and its logits [s, b, v] are the largest tensors of a small model. Four ranks, v ids:

    rank 0   ids 0 .. v/4        looks up its own ids, zeros for others  --> sum = embedding of all      (one all-reduce or scatter)
    rank 1   ids v/4 .. v/2      logits of its own ids                   --> largest logit: all-reduce max of [s, b]
    rank 2   ...                                                         --> sum of exponentials, label's logit: all-reduce of [s, b]
    rank 3   ...                                                             loss on all ranks; no logit travels

(Megatron, arXiv:1909.08053, section 3.) A rank's rows are padded to whole tiles of a matmul, and where the vocabulary does not divide
(`padded`, parallel/param.py). Rows of padding are zero, and stay so: their logits are zero, no loss reads them, and their gradient is
written as zero. In chunks (`loss_chunk`) the logits of so many tokens exist at a time, and are made again in the backward (Wijmans et
al., arXiv:2411.09009): the memory of a chunk for a third more work in the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatrain.kernels.cross_entropy import gradient_of, statistics_of
from megatrain.kernels.dispatch import Kernels
from megatrain.kernels.matmul import add_matmul, linear, matmul
from megatrain.parallel.mesh import (
    Axis,
    Done,
)
from megatrain.parallel.param import Init, Parameter, ParamSpec, Part, Split, claim, make_parameters


class _Embedding(torch.autograd.Function):
    """tokens [s, b] -> [s/t or s, b, h]: each rank looks up the ids of its rows, zeros elsewhere, then a sum."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, tokens: torch.Tensor, ids: range, tp: Axis, sequence_parallel: bool
    ) -> torch.Tensor:
        local = tokens - ids.start
        here = (local >= 0) & (local < len(ids))
        local = torch.where(here, local, 0)
        ctx.save_for_backward(local, here)
        ctx.weight, ctx.tp, ctx.sequence_parallel = weight, tp, sequence_parallel
        partial = nn.functional.embedding(local, weight) * here.unsqueeze(-1)
        return tp.scatter_summed(partial) if sequence_parallel else tp.all_reduce(partial)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        local, here = ctx.saved_tensors
        whole = ctx.tp.gathered(dy) if ctx.sequence_parallel else dy
        whole = (whole * here.unsqueeze(-1)).flatten(0, 1)
        out = getattr(ctx.weight, "main_grad", None)
        target = torch.zeros_like(ctx.weight) if out is None else out
        target.index_add_(0, local.flatten(), whole.to(target.dtype))
        return (target if out is None else None), None, None, None, None


class VocabParallelEmbedding(nn.Module):
    """Token embedding [v, h], its rows split over the ranks, with padding that no id looks up."""

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
        self.weight = vocab_parameter(name, vocab_size, hidden, tp, init, dtype, device, tied, "embedding")

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[s, b] int64 -> [s/t, b, h] with sequence parallelism, else [s, b, h]."""
        return _Embedding.apply(self.weight, tokens, ids_of(self.weight, self.tp), self.tp, self.sequence_parallel)


def vocab_parameter(
    name: str,
    vocab_size: int,
    hidden: int,
    tp: Axis,
    init: Init,
    dtype: torch.dtype,
    device: torch.device,
    tied: str | None = None,
    part: Part = "other",
) -> Parameter:
    """A [v, h] parameter split by rows over tp, padded. tied: axis whose ranks hold a copy each."""
    spec = ParamSpec(name, (vocab_size, hidden), Split(0, vocab_size, pad=True), tied=tied, init=init, part=part)
    return make_parameters([spec], tp, dtype, device)[0]


class _Logits(torch.autograd.Function):
    """x [s/t or s, b, h] -> this rank's logits [s, b, v_local], and zeros for rows of padding behind them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, tp: Axis, sequence_parallel: bool) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.tp, ctx.sequence_parallel = weight, tp, sequence_parallel
        whole = tp.gathered(x) if sequence_parallel else x
        return linear(whole, weight)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        weight = ctx.weight
        dy = dy.flatten(0, 1)
        whole, gather = ctx.tp.start_gather(x) if ctx.sequence_parallel else (x, Done())
        partial = matmul(dy, weight).view(-1, *x.shape[1:])
        start = ctx.tp.start_scatter_sum if ctx.sequence_parallel else ctx.tp.start_all_reduce
        dx, reduce = start(partial)
        gather.wait()
        out, first = claim(weight)
        target = torch.zeros_like(weight) if out is None else out
        add_matmul(target, dy.t(), whole.flatten(0, 1), first)
        reduce.wait()
        return dx, (target if out is None else None), None, None


def vocab_parallel_logits(x: torch.Tensor, weight: Parameter, tp: Axis, sequence_parallel: bool) -> torch.Tensor:
    """x [s/t or s, b, h] -> logits [s, b, v_local] of the ids this rank holds, without padding."""
    logits: torch.Tensor = _Logits.apply(x, weight, tp, sequence_parallel)
    return logits[..., : len(ids_of(weight, tp))]


def ids_of(weight: Parameter, tp: Axis) -> range:
    """The ids whose rows this rank holds."""
    rows = weight.spec.slices(tp.size, tp.rank)[0]
    return range(rows.start, rows.stop)


@dataclass(frozen=True)
class Target:
    """What the loss of a token is, besides the cross-entropy of its label."""

    label_smoothing: float = 0.0
    """Share of the target spread evenly over the vocabulary (Szegedy et al., arXiv:1512.00567, section 7)."""
    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's sum (PaLM, arXiv:2204.02311, section 5)."""
    softcap: float = 0.0
    """c: the logits are c tanh(logits / c) (Gemma 2, arXiv:2408.00118, section 2); 0 leaves them."""


CROSS_ENTROPY = Target()


@dataclass(frozen=True)
class _Rows:
    """What is known of each row of logits [n, v_local] once all ranks have told: enough for its loss and its gradient."""

    local: torch.Tensor
    """[n] int64 number of the label among this rank's ids, 0 where it is another rank's."""
    here: torch.Tensor
    """[n] bool, whether the label is this rank's."""
    top: torch.Tensor
    """[n] largest of this rank's logits."""
    to_probability: torch.Tensor
    """[n] what this rank's exponentials are multiplied by."""
    entropy: torch.Tensor
    """[n] cross-entropy of the label in nats."""
    log_sum: torch.Tensor
    """[n] logarithm of the softmax's sum."""


def _reduce_rows(
    logits: torch.Tensor, labels: torch.Tensor, ids: range, vocab_size: int, tp: Axis, target: Target, kernels: Kernels
) -> tuple[_Rows, torch.Tensor, torch.Tensor]:
    """Logits [n, v_local], turned into their exponentials in place, labels [n] -> (rows, loss [n], correct [n])."""
    local = labels - ids.start
    here = (local >= 0) & (local < len(ids))
    local = torch.where(here, local, 0)
    with_sum = target.label_smoothing > 0
    top, total, label, added = statistics_of(logits, local, here, ids=len(ids), with_sum=with_sum, kernels=kernels)
    highest = tp.all_reduce(top.clone(), "max")
    share = torch.exp(top - highest)
    sums = tp.all_reduce(torch.stack([total * share, label] if added is None else [total * share, label, added]))
    total, label = sums[0], sums[1]
    log_total = torch.log(total)
    entropy = loss = log_total + (highest - label)  # in this order: a large logit would swallow the logarithm
    log_sum = log_total + highest
    if target.label_smoothing:
        loss = loss + target.label_smoothing * (label - sums[2] / vocab_size)
    if target.z_loss:
        loss = loss + target.z_loss * log_sum.square()
    return _Rows(local, here, top, share / total, entropy, log_sum), loss, label >= highest


def _gradient(
    logits: torch.Tensor, rows: _Rows, dloss: torch.Tensor, ids: range, vocab_size: int, target: Target, kernels: Kernels
) -> None:
    """Turn what `_reduce_rows` left of logits [n, v_local] into the gradient of the logits, in place; dloss [n]."""
    scale = dloss.to(rows.to_probability.dtype)
    of_sum, smoothed = scale, target.label_smoothing * scale
    # p - 1 of the label from the loss: of a rounded p near 1 little would be left.
    label = torch.expm1(-rows.entropy) * scale
    if target.z_loss:
        of_sum = scale * (1 + 2 * target.z_loss * rows.log_sum)
        label = label + torch.exp(-rows.entropy) * (of_sum - scale)
    spread = smoothed / vocab_size if target.label_smoothing else None
    if spread is not None:
        label = label + smoothed - spread
    factor = rows.to_probability * of_sum
    gradient_of(logits, rows.top, factor, spread, rows.local, rows.here, label, ids=len(ids), kernels=kernels)


class _CrossEntropy(torch.autograd.Function):
    """logits [s, b, v_local], with or without padding -> (loss [s, b], correct [s, b]); in place the logits become their
    exponentials, then their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        ids: range,
        vocab_size: int,
        tp: Axis,
        target: Target,
        kernels: Kernels,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        flat = logits.detach().flatten(0, 1)
        rows, loss, correct = _reduce_rows(flat, labels.flatten(), ids, vocab_size, tp, target, kernels)
        ctx.save_for_backward(flat, *vars(rows).values())
        ctx.rest = logits.shape, ids, vocab_size, target, kernels
        ctx.mark_non_differentiable(correct)
        return loss.view(labels.shape), correct.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor, _dcorrect: torch.Tensor) -> Any:
        shape, *rest = ctx.rest
        flat, *rows = ctx.saved_tensors
        _gradient(flat, _Rows(*rows), dloss.flatten(), *rest)
        return flat.view(shape), None, None, None, None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    """x [s/t or s, b, h] -> (loss [s, b], correct [s, b]), with the logits of so many tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Parameter, labels: torch.Tensor, head: _Head
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, labels)
        ctx.weight, ctx.head = weight, head
        flat = (head.tp.gathered(x) if head.sequence_parallel else x).flatten(0, 1)
        results = [head.rows_of(flat[part], weight, labels.flatten()[part])[1:] for part in head.chunks(flat)]
        loss, correct = (torch.cat(parts).view(labels.shape) for parts in zip(*results, strict=True))
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor, _dcorrect: torch.Tensor) -> Any:
        x, labels = ctx.saved_tensors
        head, weight = ctx.head, ctx.weight
        whole = head.tp.gathered(x) if head.sequence_parallel else x
        flat, partial = whole.flatten(0, 1), torch.empty_like(whole)
        out, first = claim(weight)
        target = torch.zeros_like(weight) if out is None else out
        for part in head.chunks(flat):
            logits = head.gradient_of_logits(flat[part], weight, labels.flatten()[part], dloss.flatten()[part])
            partial.flatten(0, 1)[part] = matmul(logits, weight)
            add_matmul(target, logits.t(), flat[part], first and part.start == 0)
        start = head.tp.start_scatter_sum if head.sequence_parallel else head.tp.start_all_reduce
        dx, reduce = start(partial)
        reduce.wait()
        return dx, (target if out is None else None), None, None


@dataclass(frozen=True)
class _Head:
    """What the chunks of a head have in common."""

    tp: Axis
    sequence_parallel: bool
    ids: range
    """Of this rank."""
    vocab_size: int
    target: Target
    chunk: int
    """Tokens whose logits exist at a time."""
    kernels: Kernels

    def chunks(self, flat: torch.Tensor) -> list[slice]:
        """The tokens [n, h] in chunks."""
        return [slice(start, start + self.chunk) for start in range(0, len(flat), self.chunk)]

    def rows_of(
        self, x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, _Rows, torch.Tensor], torch.Tensor, torch.Tensor]:
        """x [n, h], labels [n] -> ((exponentials, rows, slope of the cap), loss [n], correct [n])."""
        logits = capped(linear(x, weight), self.target.softcap)
        slope = 1 - (logits / self.target.softcap).square() if self.target.softcap else logits.new_ones(())
        rows, loss, correct = _reduce_rows(logits, labels, self.ids, self.vocab_size, self.tp, self.target, self.kernels)
        return (logits, rows, slope), loss, correct

    def gradient_of_logits(
        self, x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, dloss: torch.Tensor
    ) -> torch.Tensor:
        """Of the uncapped logits [n, v_local], padding included."""
        (logits, rows, slope), _, _ = self.rows_of(x, weight, labels)
        _gradient(logits, rows, dloss, self.ids, self.vocab_size, self.target, self.kernels)
        return logits.mul_(slope) if self.target.softcap else logits


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: Parameter,
    tp: Axis,
    target: Target = CROSS_ENTROPY,
    kernels: Kernels = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy over logits that stay split: [s, b, v_local], labels [s, b] -> (loss [s, b] in nats, correct [s, b] bool).

    At least float32 inside. Two small all-reduces of [s, b]: the largest logit, then the sum of exponentials and the label's
    logit. `correct`: no logit is larger than the label's. Padding may be there. `logits` are used up: do not read them afterwards.
    """
    return _CrossEntropy.apply(logits, labels, ids_of(weight, tp), weight.spec.shape[0], tp, target, kernels)


def vocab_parallel_loss(
    x: torch.Tensor,
    labels: torch.Tensor,
    weight: Parameter,
    tp: Axis,
    sequence_parallel: bool,
    target: Target = CROSS_ENTROPY,
    chunk: int = 0,
    kernels: Kernels = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Head and loss in one: x [s/t or s, b, h], labels [s, b] -> (loss [s, b] in nats, correct [s, b] bool).

    chunk: tokens (of s b) whose logits exist at a time; 0: all, and they are kept for the backward.
    """
    if not chunk:
        logits = capped(_Logits.apply(x, weight, tp, sequence_parallel), target.softcap)
        return vocab_parallel_cross_entropy(logits, labels, weight, tp, target, kernels)
    head = _Head(tp, sequence_parallel, ids_of(weight, tp), weight.spec.shape[0], target, chunk, kernels)
    return _LinearCrossEntropy.apply(x, weight, labels, head)


def capped(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """c tanh(logits / c); 0 leaves them."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits
