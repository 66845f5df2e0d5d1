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

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from megatrain.kernels.cross_entropy import gradient_of, statistics_of
from megatrain.kernels.dispatch import Kernels
from megatrain.kernels.matmul import add_matmul, linear, matmul
from megatrain.parallel.mesh import Axis, Rows
from megatrain.parallel.param import Parameter, ParamSpec, Place, Split, claim, make_parameters


def vocab_parameter(spec: ParamSpec, place: Place) -> Parameter:
    """A [v, h] parameter, its rows split over tp and padded."""
    return make_parameters([replace(spec, split=Split(0, spec.shape[0], pad=True))], place)[0]


def ids_of(weight: Parameter, tp: Axis) -> range:
    """The ids whose rows this rank holds."""
    rows = weight.spec.slices(tp.size, tp.rank)[0]
    return range(rows.start, rows.stop)


def _find(ids: torch.Tensor, held: range) -> tuple[torch.Tensor, torch.Tensor]:
    """(number of each id among this rank's, 0 where it is another rank's; whether it is this rank's)."""
    local = ids - held.start
    here = (local >= 0) & (local < len(held))
    return torch.where(here, local, 0), here


class _Embedding(torch.autograd.Function):
    """tokens [s, b] -> [s/t or s, b, h]: each rank looks up the ids of its rows, zeros elsewhere, then a sum."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, tokens: torch.Tensor, ids: range, rows: Rows) -> torch.Tensor:
        local, here = _find(tokens, ids)
        ctx.save_for_backward(local, here)
        ctx.weight, ctx.rows = weight, rows
        return rows.leave(nn.functional.embedding(local, weight) * here.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        local, here = ctx.saved_tensors
        whole = (ctx.rows.enter(dy) * here.unsqueeze(-1)).flatten(0, 1)
        out = getattr(ctx.weight, "main_grad", None)
        target = torch.zeros_like(ctx.weight) if out is None else out
        target.index_add_(0, local.flatten(), whole.to(target.dtype))
        return (target if out is None else None), None, None, None


class VocabParallelEmbedding(nn.Module):
    """Token embedding [v, h], its rows split over the ranks, with padding that no id looks up."""

    def __init__(self, spec: ParamSpec, place: Place) -> None:
        super().__init__()
        self.rows, self.weight = place.rows, vocab_parameter(spec, place)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[s, b] int64 -> [s/t, b, h] with sequence parallelism, else [s, b, h]."""
        return _Embedding.apply(self.weight, tokens, ids_of(self.weight, self.rows.tp), self.rows)


class Target(NamedTuple):
    """Terms of a token's loss besides the cross-entropy of its label."""

    label_smoothing: float = 0.0
    """Share of the target spread evenly over the vocabulary (Szegedy et al., arXiv:1512.00567, section 7)."""
    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's sum (PaLM, arXiv:2204.02311, section 5)."""


CROSS_ENTROPY = Target()


@dataclass(frozen=True)
class VocabParallelHead:
    """An output matrix [v, h], its rows split over the ranks, and the loss of its logits."""

    weight: Parameter
    rows: Rows
    softcap: float = 0.0
    """c: the logits are c tanh(logits / c) (Gemma 2, arXiv:2408.00118, section 2); 0 leaves them."""
    chunk: int = 0
    """Tokens (of s b) whose logits exist at a time; 0: all, and they are kept for the backward."""
    kernels: Kernels = "auto"

    @property
    def ids(self) -> range:
        """The ids whose rows this rank holds."""
        return ids_of(self.weight, self.rows.tp)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x [s/t or s, b, h] -> logits [s, b, v_local] of this rank's ids, without padding."""
        return self.capped(_Logits.apply(x, self.weight, self.rows)[..., : len(self.ids)])

    def loss(self, x: torch.Tensor, labels: torch.Tensor, target: Target = CROSS_ENTROPY) -> tuple[torch.Tensor, torch.Tensor]:
        """x [s/t or s, b, h], labels [s, b] -> (loss [s, b] in nats, correct [s, b] bool)."""
        if self.chunk:
            return _LinearCrossEntropy.apply(x, self.weight, labels, self, target)
        return self.cross_entropy(self.capped(_Logits.apply(x, self.weight, self.rows)), labels, target)

    def cross_entropy(
        self, logits: torch.Tensor, labels: torch.Tensor, target: Target = CROSS_ENTROPY
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy over logits that stay split: [s, b, v_local], labels [s, b] -> (loss [s, b] in nats, correct [s, b] bool).

        At least float32 inside. Two small all-reduces of [s, b]: the largest logit, then the sum of exponentials and the label's
        logit. `correct`: no logit is larger than the label's. Padding may be there. `logits` are used up: do not read them afterwards.
        """
        return _CrossEntropy.apply(logits, labels, self, target)

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """c tanh(logits / c)."""
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor, target: Target) -> tuple[_Reduced, torch.Tensor, torch.Tensor]:
        """Logits [n, v_local], turned into their exponentials in place, labels [n] -> (what `gradient` reads, loss [n], correct [n])."""
        local, here = _find(labels, self.ids)
        smoothed = target.label_smoothing > 0
        statistics = statistics_of(logits, local, here, ids=len(self.ids), with_sum=smoothed, kernels=self.kernels)
        top, total, label, added = statistics
        highest = self.rows.tp.all_reduce(top.clone(), "max")
        share = torch.exp(top - highest)
        sums = self.rows.tp.all_reduce(torch.stack([total * share, label] if added is None else [total * share, label, added]))
        total, label = sums[0], sums[1]
        log_total = torch.log(total)
        entropy = loss = log_total + (highest - label)  # in this order: a large logit would swallow the logarithm
        log_sum = log_total + highest
        if target.label_smoothing:
            loss = loss + target.label_smoothing * (label - sums[2] / self.weight.spec.shape[0])
        if target.z_loss:
            loss = loss + target.z_loss * log_sum.square()
        return _Reduced(local, here, top, share / total, entropy, log_sum), loss, label >= highest

    def gradient(self, logits: torch.Tensor, of: _Reduced, dloss: torch.Tensor, target: Target) -> None:
        """Turn what `reduce` left of logits [n, v_local] into the gradient of the logits, in place; dloss [n]."""
        scale = dloss.to(of.to_probability.dtype)
        of_sum, smoothed = scale, target.label_smoothing * scale
        # p - 1 of the label from the loss: of a rounded p near 1 little would be left.
        label = torch.expm1(-of.entropy) * scale
        if target.z_loss:
            of_sum = scale * (1 + 2 * target.z_loss * of.log_sum)
            label = label + torch.exp(-of.entropy) * (of_sum - scale)
        spread = smoothed / self.weight.spec.shape[0] if target.label_smoothing else None
        if spread is not None:
            label = label + smoothed - spread
        factor, ids = of.to_probability * of_sum, len(self.ids)
        gradient_of(logits, of.top, factor, spread, of.local, of.here, label, ids=ids, kernels=self.kernels)


class _Reduced(NamedTuple):
    """Statistics of each row of logits [n, v_local], reduced over tp: enough for its loss and its gradient."""

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


class _Logits(torch.autograd.Function):
    """x [s/t or s, b, h] -> this rank's logits [s, b, v_local], and zeros for rows of padding behind them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.rows = weight, rows
        return linear(rows.enter(x), weight)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        dy = dy.flatten(0, 1)
        whole, entering = ctx.rows.start_enter(x)
        dx, leaving = ctx.rows.start_leave(matmul(dy, ctx.weight).view(-1, *x.shape[1:]))
        entering.wait()
        out, first = claim(ctx.weight)
        target = torch.zeros_like(ctx.weight) if out is None else out
        add_matmul(target, dy.t(), whole.flatten(0, 1), first)
        leaving.wait()
        return dx, (target if out is None else None), None


class _CrossEntropy(torch.autograd.Function):
    """logits [s, b, v_local], with or without padding -> (loss [s, b], correct [s, b]); in place the logits become their
    exponentials, then their gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, head: VocabParallelHead, target: Target
    ) -> tuple[torch.Tensor, torch.Tensor]:
        flat = logits.detach().flatten(0, 1)
        reduced, loss, correct = head.reduce(flat, labels.flatten(), target)
        ctx.save_for_backward(flat, *reduced)
        ctx.shape, ctx.head, ctx.target = logits.shape, head, target
        ctx.mark_non_differentiable(correct)
        return loss.view(labels.shape), correct.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor, _dcorrect: torch.Tensor) -> Any:
        flat, *reduced = ctx.saved_tensors
        ctx.head.gradient(flat, _Reduced(*reduced), dloss.flatten(), ctx.target)
        return flat.view(ctx.shape), None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    """x [s/t or s, b, h] -> (loss [s, b], correct [s, b]), with the logits of so many tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Parameter, labels: torch.Tensor, head: VocabParallelHead, target: Target
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, labels)
        ctx.weight, ctx.head, ctx.target = weight, head, target
        flat, ids = head.rows.enter(x).flatten(0, 1), labels.flatten()
        results = [
            head.reduce(head.capped(linear(flat[part], weight)), ids[part], target)[1:] for part in _chunks(flat, head.chunk)
        ]
        loss, correct = (torch.cat(parts).view(labels.shape) for parts in zip(*results, strict=True))
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor, _dcorrect: torch.Tensor) -> Any:
        x, labels = ctx.saved_tensors
        head, weight = ctx.head, ctx.weight
        whole = head.rows.enter(x)
        flat, partial = whole.flatten(0, 1), torch.empty_like(whole)
        out, first = claim(weight)
        target = torch.zeros_like(weight) if out is None else out
        for part in _chunks(flat, head.chunk):
            logits = head.capped(linear(flat[part], weight))
            slope = 1 - (logits / head.softcap).square() if head.softcap else None
            reduced, _, _ = head.reduce(logits, labels.flatten()[part], ctx.target)
            head.gradient(logits, reduced, dloss.flatten()[part], ctx.target)
            logits = logits if slope is None else logits.mul_(slope)
            partial.flatten(0, 1)[part] = matmul(logits, weight)
            add_matmul(target, logits.t(), flat[part], first and part.start == 0)
        dx, leaving = head.rows.start_leave(partial)
        leaving.wait()
        return dx, (target if out is None else None), None, None, None


def _chunks(flat: torch.Tensor, chunk: int) -> list[slice]:
    """The tokens [n, h], so many at a time."""
    return [slice(start, start + chunk) for start in range(0, len(flat), chunk)]
