"""AdamW (Loshchilov & Hutter, arXiv:1711.05101) and Adam with L2 (Kingma & Ba, arXiv:1412.6980): one update of flat tensors.

With g the gradient over `grad_divisor`, n the number of this update and d the weight decay:

    w <- (1 - lr d) w       (AdamW)           g <- g + d w       (Adam)
    m <- m + (1 - b1) (g - m)                 v <- b2 v + (1 - b2) g g
    w <- w - lr / (1 - b1^n) m / (sqrt(v) / sqrt(1 - b2^n) + eps)

and where `skip` is 1 nothing changes. n, the divisor and the flag stay on the device: nothing is synchronised.

The Triton kernel reads g, w, m, v and writes w, m, v and the parameter rounded from w, each once: 30 bytes a parameter in BF16, 28
with masters in halves (kernels/split_float.py). It gives the bits of the reference on a CPU, torch's own fused kernel, whose vectors
round three products together with the sum after them, as x86 with FMA has it; so they are rounded here, and no others. (If the number of
elements is no multiple of 16, the compiler decides how torch rounds the last ones. Buckets are multiples of 64.)
"""

from __future__ import annotations

from typing import Any

import torch

from megatrain.kernels.dispatch import jit, tl
from megatrain.kernels.update import Update

BLOCK = 1024
"""Number of elements that one Triton program updates."""


def adam_reference(
    update: Update,
    weight_decay: float,
    weights: torch.Tensor,
    grads: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    decoupled: bool = True,
) -> None:
    """Update weights and states [n], all float32 or all float64, in place by torch's fused kernel; gradients may be divided in place.

    decoupled: weight decay is AdamW's, apart from the gradient; else Adam's.
    """
    divisor = update.grad_divisor
    if grads.dtype == torch.float64:  # the kernel takes a float32 divisor, which would cost half of the digits
        grads.div_(divisor)
        divisor = torch.ones_like(divisor)
    # The kernel writes divided gradients back, an eighth of all traffic. On a CPU it costs nothing to see that there is no need.
    plain = not divisor.is_cuda and float(divisor) == 1 and float(update.skip) == 0
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    kernel(
        [weights],
        [grads],
        [exp_avg],
        [exp_avg_sq],
        [],
        [update.count],
        lr=update.lr,
        beta1=update.betas[0],
        beta2=update.betas[1],
        weight_decay=weight_decay,
        eps=update.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None if plain else divisor.to(torch.float32),
        found_inf=None if plain else update.skip.to(torch.float32),
    )


def adam_numba(*given: Any, decoupled: bool = True) -> None:
    """`adam_triton` for BF16 parameters on a CPU, by numba."""
    from megatrain.kernels.cpu_adamw import adam  # noqa: PLC0415  numba is optional

    adam(*given, decoupled=decoupled)


# --- Triton ---------------------------------------------------------------------------------------------------------------


@jit
def _adam_kernel(
    parameters, masters, low, grads, exp_avg, exp_avg_sq, scalars, n, keep, decay, share1, beta2, share2, eps,
    APART: tl.constexpr, HALVES: tl.constexpr, BF16: tl.constexpr, L2: tl.constexpr, NEAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    divisor, step_size, root = tl.load(scalars), tl.load(scalars + 2), tl.load(scalars + 3)
    here = at < tl.where(tl.load(scalars + 1) > 0.0, 0, n)
    g = tl.div_rn(tl.load(grads + at, mask=here, other=0.0), divisor)
    m = tl.load(exp_avg + at, mask=here, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=here, other=0.0)
    if HALVES:
        high = tl.load(parameters + at, mask=here, other=0).to(tl.int32) << 16
        w = (high + tl.load(low + at, mask=here, other=0).to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        w = tl.load(masters + at, mask=here, other=0.0)
    if L2:
        g = tl.fma(w, decay, g)
    w = w * keep
    m = tl.fma(g - m, share1, m) if NEAR else tl.fma(g - m, share1 - 1.0, g)
    v = tl.fma(g * share2, g, v * beta2)
    w = w + tl.div_rn(m * step_size, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    tl.store(exp_avg + at, m, mask=here)
    tl.store(exp_avg_sq + at, v, mask=here)
    bits = w.to(tl.int32, bitcast=True)
    if HALVES:
        tl.store(low + at, bits.to(tl.int16), mask=here)
    else:
        tl.store(masters + at, w, mask=here)
    if BF16:
        tl.store(parameters + at, ((bits + 0x8000) >> 16).to(tl.int16), mask=here)
    elif APART:
        tl.store(parameters + at, w.to(parameters.dtype.element_ty), mask=here)


def adam_triton(
    update: Update,
    weight_decay: float,
    parameters: torch.Tensor,
    masters: torch.Tensor | None,
    low: torch.Tensor | None,
    grads: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    decoupled: bool = True,
) -> None:
    """Update parameters [n] of any dtype but float64, with their masters and float32 states, in place; all contiguous.

    masters: float32; low: int16, the halves that BF16 parameters lack; where both are None the parameters are float32, their own masters.
    """
    n = grads.numel()
    if n == 0:
        return
    beta1, beta2 = update.betas
    bf16 = parameters.dtype == torch.bfloat16
    _adam_kernel[(-(-n // BLOCK),)](
        parameters.view(torch.int16) if bf16 else parameters,
        parameters if masters is None else masters,
        low,
        grads,
        exp_avg,
        exp_avg_sq,
        update.scalars,
        n,
        1 - update.lr * weight_decay if decoupled else 1.0,
        weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        update.eps,
        APART=masters is not None,
        HALVES=low is not None,
        BF16=bf16,
        L2=weight_decay != 0 and not decoupled,
        NEAR=1 - beta1 < 0.5,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
