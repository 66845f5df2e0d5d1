"""Activation recomputation: keep less of the forward, and make it again in the backward (Korthikanti et al., arXiv:2205.05198).

none        a block keeps what its backward reads
selective   it does not keep what is large and cheap to make: norm outputs and the activation function's, which only weight gradients
            read. A linear layer is then told how to make its input again (`remake`), and no matmul runs twice. (The paper's own
            case, the attention core, never arises: every attention kernel here makes its probabilities again by itself.)
full        a block keeps its input alone, and runs its whole forward again

Nothing random is restored: dropout masks are a function of what they are for (`parallel/rng.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def recomputed(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """function(x), of which only x is kept; the backward runs `function` again, with the same parameters."""
    if not torch.is_grad_enabled():
        return function(x)
    return _Recomputed.apply(x if x.requires_grad else x.detach().requires_grad_(), function)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return function(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(ctx.function(x), dy)
        return x.grad, None
