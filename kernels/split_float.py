"""A float32 number as a bfloat16 number and the 16 bits that it lacks, and back, exactly.

    float32 bits      [ sign | exponent | 7 bits of mantissa |  16 low bits ]
    rounded           (bits + 0x8000) >> 16                     bfloat16: nearest, and ties away from zero
    low half          bits as a signed 16-bit integer           0x8000 and more count as negative: the half was rounded up
    back              (rounded << 16) + low half

Ties to even, as the hardware rounds, would lose one bit: at a tie (low half 0x8000) it rounds up or down depending on the bit above, and
the low half alone does not tell which. Sign and magnitude are apart in a float, so adding to the bits rounds away from zero; a carry
runs into the exponent as it should, up to infinity. NaN is not kept as it is (its largest payload would carry into the sign).
"""

from __future__ import annotations

import torch

_HALF = 0x8000


def round_to_bf16(out: torch.Tensor, x: torch.Tensor) -> None:
    """out [n] bfloat16 = x [n] float32 rounded to nearest, ties away from zero. Contiguous."""
    out.view(torch.int16).copy_((x.view(torch.int32) + _HALF).bitwise_right_shift_(16))


def split_float(high: torch.Tensor, low: torch.Tensor, x: torch.Tensor) -> None:
    """high [n] bfloat16, low [n] int16: the two halves of x [n] float32, from which `join_float` makes x again. Contiguous."""
    round_to_bf16(high, x)
    low.copy_(x.view(torch.int32))  # the conversion keeps the low 16 bits


def join_float(out: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    """out [n] float32 = the number whose halves are high [n] bfloat16 and low [n] int16. Contiguous."""
    bits = out.view(torch.int32)
    bits.copy_(high.view(torch.int16)).bitwise_left_shift_(16).add_(low.to(torch.int32))  # mixed types would add slowly
