"""AdamW and Adam as one function each on lists of flat tensors, over torch's own fused kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def adam_step(
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avg: Sequence[torch.Tensor],
    exp_avg_sq: Sequence[torch.Tensor],
    *,
    step: torch.Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    grad_divisor: torch.Tensor,
    skip: torch.Tensor,
) -> None:
    """One update in place: AdamW (Loshchilov & Hutter, arXiv:1711.05101) if `decoupled`, else Adam with L2 (arXiv:1412.6980).

    `step` (float32 scalar tensor) counts from 1. Gradients are divided by `grad_divisor` (scalar tensor) on the way, in place;
    where `skip` (scalar float tensor) is 1 nothing changes. Both stay on the device: no synchronisation.
    """
    if grads[0].dtype == torch.float64:  # the kernel takes a float32 divisor, which would cost half of the digits
        torch._foreach_div_(list(grads), grad_divisor)
        grad_divisor = torch.ones_like(grad_divisor)
    # The kernel writes divided gradients back, an eighth of all traffic. On a CPU it costs nothing to see that there is no need.
    plain = not grad_divisor.is_cuda and float(grad_divisor) == 1 and float(skip) == 0
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    kernel(
        list(weights),
        list(grads),
        list(exp_avg),
        list(exp_avg_sq),
        [],
        [step] * len(weights),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None if plain else grad_divisor.to(torch.float32),
        found_inf=None if plain else skip.to(torch.float32),
    )
