"""Split one projection's q|k|v into heads, and rotate queries and keys by their positions (rotary embedding, Su et al.,
arXiv:2104.09864): the first r elements of each head, in pairs.

    y1 = x1 cos - x2 sin      y2 = x2 cos + x1 sin      the rest stays; pairs are the halves of the r numbers, or neighbours

A rotation is orthogonal (times the tables' magnitude): its backward is the rotation by the opposite angle. `heads` turns queries and
keys where they lie, in the projection's output q|k|v, and values stay there; its backward writes the three gradients beside one
another, as the projection reads them (kernels/beside.py), and sums them over the tokens where the projection had a bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatrain.kernels.beside import beside
from megatrain.kernels.dispatch import Kernels, jit, multiprocessors, next_power, tl, use_numba, use_triton
from megatrain.kernels.gated import row_sums

TILE = 2048
"""Elements that one Triton program takes at a time: one head, of as many tokens as fit."""


@dataclass(frozen=True)
class Turns:
    """Angles of a rotation: tables [positions, r/2] of cosines and sines, and each token's positions in them.

    With two positions (rope_2d) the first half of a head is rotated by the first and the second half by the second, each as a head of
    its own, with tables for half a head.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    places: tuple[torch.Tensor, ...]
    """One or two tensors [s, b] of positions; none if the tables have a row for each token."""
    interleaved: bool

    @property
    def pairs(self) -> int:
        """Number of pairs rotated in each head, or with rope_2d in each half: r/2."""
        return self.cos.shape[-1]


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool, kernels: Kernels = "auto"
) -> torch.Tensor:
    """x [s, b, a, d] rotated by each token's cos and sin [s, b, r/2]."""
    return _Rotate.apply(x, cos, sin, interleaved, use_triton(kernels, x.device))


def heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    head_dim: int,
    turns: Turns | None = None,
    *,
    bias: torch.Tensor | None = None,
    kernels: Kernels = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [s, b, a d], k and v [s, b, g d], the outputs of one projection -> q [s, b, a, d] and k [s, b, g, d] turned, v [s, b, g, d].

    All three are views, where the inputs lie beside one another; which are used up: do not read them afterwards. bias: stands for what
    was added to q|k|v before, [(a + 2 g) d]; its gradient is made here.
    """
    return _Heads.apply(q, k, v, bias, head_dim, turns, kernels)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, triton: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.settings = interleaved, triton
        return _rotate(x, cos, sin, interleaved, triton)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return _rotate(dy, *ctx.saved_tensors, *ctx.settings, back=True), None, None, None, None


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        d: int,
        turns: Turns | None,
        kernels: Kernels,
    ) -> tuple[torch.Tensor, ...]:
        triton = use_triton(kernels, q.device)
        widths = [x.shape[-1] for x in (q, k, v)]
        whole = beside((q, k, v))
        if triton and turns is not None and not _even(whole):
            whole = whole.contiguous()
        parts = [x.unflatten(-1, (-1, d)) for x in whole.split(widths, -1)]
        ctx.settings = d, turns, kernels, None if bias is None else bias.dtype
        if turns is not None and triton:
            _launch(parts[:2], whole[..., : -widths[2]], turns)
        elif turns is not None:
            for cos, sin, *halves in _halves(turns, parts[:2]):
                for part in halves:
                    turn_in_place(part, cos, sin, turns.interleaved)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> Any:
        d, turns, kernels, wide = ctx.settings
        summed = ctx.needs_input_grad[3]
        widths = [dy.shape[2] * d for dy in dys]
        whole = dys[0].new_empty(*dys[0].shape[:2], sum(widths))
        if use_triton(kernels, whole.device):
            sums = _launch(dys, whole, turns, summed=summed, back=True)
        elif turns is None and use_numba(kernels, whole):
            sums = _placed(dys, whole)
        else:
            parts = [x.unflatten(-1, (-1, d)) for x in whole.split(widths, -1)]
            for dy, part in list(zip(dys, parts, strict=True))[0 if turns is None else 2 :]:
                part.copy_(dy)
            if turns is not None:
                for cos, sin, dq, dk, q, k in _halves(turns, (*dys[:2], *parts[:2])):
                    turn(dq, cos, sin, turns.interleaved, q, back=True)
                    turn(dk, cos, sin, turns.interleaved, k, back=True)
            sums = row_sums(whole) if summed else None
        return *whole.split(widths, -1), sums.to(wide) if summed and sums is not None else None, None, None, None


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, triton: bool, *, back: bool = False
) -> torch.Tensor:
    """x [s, b, a, d] turned by cos and sin [s, b, r/2], or turned back; contiguous, no gradient."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if triton:
        cos, sin = (table.expand(*x.shape[:2], -1).contiguous() for table in (cos, sin))
        _launch([x], y.flatten(2), Turns(cos, sin, (), interleaved), back=back)
    else:
        turn(x, cos, sin, interleaved, y, back=back)
    return y


def _placed(parts: Sequence[torch.Tensor], whole: torch.Tensor) -> torch.Tensor:
    """Copy parts [s, b, heads, d] beside one another into `whole` by numba; the sum over tokens, float32, is returned."""
    from megatrain.kernels.cpu import PARTS  # noqa: PLC0415  numba is optional
    from megatrain.kernels.cpu_heads import place  # noqa: PLC0415

    sums, start = torch.empty(PARTS, whole.shape[2]), 0
    for x in parts:
        place(x if x.stride(3) == 1 else x.contiguous(), whole, start, sums)
        start += x.shape[2] * x.shape[3]
    return sums.sum(0)


def turn(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, y: torch.Tensor, *, back: bool = False
) -> None:
    """The reference: y becomes x [s, b, a, d] turned by cos and sin [s, b, r/2], or turned back; no gradient."""
    pairs, sign = cos.shape[-1], -1 if back else 1
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    x1, x2 = _pairs(x, pairs, interleaved)
    y1, y2 = _pairs(y, pairs, interleaved)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=sign)
    if 2 * pairs < x.shape[-1]:
        y[..., 2 * pairs :] = x[..., 2 * pairs :]


def turn_in_place(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> None:
    """`turn` of x [s, b, a, d] in place, with the same bits."""
    x1, x2 = _pairs(x, cos.shape[-1], interleaved)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    before = x1.clone()
    x1.mul_(cos).addcmul_(x2, sin, value=-1)
    x2.mul_(cos).addcmul_(before, sin)


def _halves(turns: Turns, parts: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """For each position of a token: cosines and sines [s, b, r/2], and the half (or whole) of each part [s, b, heads, d] they rotate."""
    of_places = zip(*(x.chunk(len(turns.places), -1) for x in parts), strict=True)
    for place, those in zip(turns.places, of_places, strict=True):
        yield turns.cos[place], turns.sin[place], *those


def _pairs(x: torch.Tensor, pairs: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the first and of the second elements of all pairs, [..., r/2] each."""
    if interleaved:
        return x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    return x[..., :pairs], x[..., pairs : 2 * pairs]


# --- Triton ---------------------------------------------------------------------------------------------------------------


@jit
def _turn_kernel(
    source, out, cos, sin, places, sums, tokens, batch, stride_s, stride_b, stride_out, d, pairs, PLACES: tl.constexpr,
    BACK: tl.constexpr, INTERLEAVED: tl.constexpr, BIAS: tl.constexpr, EACH: tl.constexpr, TOKENS: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Copy one head of EACH times TOKENS tokens, rotated, from `source` to `out`."""
    pair, after = tl.arange(0, PAIRS), 2 * pairs + tl.arange(0, REST)
    total1, total2 = tl.zeros((TOKENS, PAIRS), tl.float32), tl.zeros((TOKENS, PAIRS), tl.float32)
    total_rest = tl.zeros((TOKENS, REST), tl.float32)
    for i in range(EACH):
        token = (tl.program_id(0).to(tl.int64) * EACH + i) * TOKENS + tl.arange(0, TOKENS)[:, None]
        live = token < tokens
        line = source + (token // batch) * stride_s + (token % batch) * stride_b
        target = out + token * stride_out
        here = live & (pair < pairs)[None, :]
        place = tl.load(places + token, mask=live, other=0) if PLACES else token
        c = tl.load(cos + place * pairs + pair[None, :], mask=here, other=0.0).to(tl.float32)
        s = tl.load(sin + place * pairs + pair[None, :], mask=here, other=0.0).to(tl.float32)
        if BACK:
            s = -s
        if INTERLEAVED:  # read and written as they lie: one of each kind would be two passes of half words
            both = tl.arange(0, 2 * PAIRS)[None, :]
            inside = live & (both < 2 * pairs)
            x1, x2 = tl.split(tl.load(line + both, mask=inside, other=0.0).to(tl.float32).reshape(TOKENS, PAIRS, 2))
        else:
            x1 = tl.load(line + pair[None, :], mask=here, other=0.0).to(tl.float32)
            x2 = tl.load(line + pair[None, :] + pairs, mask=here, other=0.0).to(tl.float32)
        y1, y2 = x1 * c - x2 * s, x2 * c + x1 * s
        if INTERLEAVED:
            turned = tl.join(y1, y2).reshape(TOKENS, 2 * PAIRS)
            tl.store(target + both, turned.to(out.dtype.element_ty), mask=inside)
        else:
            tl.store(target + pair[None, :], y1.to(out.dtype.element_ty), mask=here)
            tl.store(target + pair[None, :] + pairs, y2.to(out.dtype.element_ty), mask=here)
        total1 += y1
        total2 += y2
        if REST > 1:
            unturned = live & (after < d)[None, :]
            x = tl.load(line + after[None, :], mask=unturned, other=0.0)
            tl.store(target + after[None, :], x, mask=unturned)
            total_rest += x.to(tl.float32)
    if BIAS:
        tl.store(sums + (2 * pair if INTERLEAVED else pair), tl.sum(total1, 0), mask=pair < pairs)
        tl.store(sums + (2 * pair + 1 if INTERLEAVED else pair + pairs), tl.sum(total2, 0), mask=pair < pairs)
        if REST > 1:
            tl.store(sums + after, tl.sum(total_rest, 0), mask=after < d)


@jit
def _copy_kernel(
    source, out, sums, tokens, batch, stride_s, stride_b, stride_out, d, BIAS: tl.constexpr, EACH: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Copy one head of EACH times TOKENS tokens from `source` to `out`."""
    column = tl.arange(0, WIDTH)
    total = tl.zeros((TOKENS, WIDTH), tl.float32)
    for i in range(EACH):
        token = (tl.program_id(0).to(tl.int64) * EACH + i) * TOKENS + tl.arange(0, TOKENS)[:, None]
        here = (token < tokens) & (column < d)[None, :]
        line = source + (token // batch) * stride_s + (token % batch) * stride_b
        x = tl.load(line + column[None, :], mask=here, other=0.0)
        tl.store(out + token * stride_out + column[None, :], x, mask=here)
        total += x.to(tl.float32)
    if BIAS:
        tl.store(sums + column, tl.sum(total, 0), mask=column < d)


@jit
def _heads_kernel(
    q, k, v, out, cos, sin, places, sums, tokens, batch, heads, groups, d, pairs, q_s, q_b, q_head, k_s, k_b, k_head, v_s, v_b,
    v_head, stride_out, TURN: tl.constexpr, PLACES: tl.constexpr, HALVES: tl.constexpr, BACK: tl.constexpr,
    INTERLEAVED: tl.constexpr, BIAS: tl.constexpr, EACH: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(1)
    head, half = number // HALVES, number % HALVES  # half a head is a head of its own
    out += number * d
    places += half * tokens
    if BIAS:
        sums += tl.program_id(0) * stride_out + number * d
    if head < heads:
        source = q + head * q_head + half * d
        if TURN:
            _turn_kernel(
                source, out, cos, sin, places, sums, tokens, batch, q_s, q_b, stride_out, d, pairs, PLACES, BACK, INTERLEAVED,
                BIAS, EACH, TOKENS, PAIRS, REST,
            )  # fmt: skip
        else:
            _copy_kernel(source, out, sums, tokens, batch, q_s, q_b, stride_out, d, BIAS, EACH, TOKENS, WIDTH)
    elif head < heads + groups:
        source = k + (head - heads) * k_head + half * d
        if TURN:
            _turn_kernel(
                source, out, cos, sin, places, sums, tokens, batch, k_s, k_b, stride_out, d, pairs, PLACES, BACK, INTERLEAVED,
                BIAS, EACH, TOKENS, PAIRS, REST,
            )  # fmt: skip
        else:
            _copy_kernel(source, out, sums, tokens, batch, k_s, k_b, stride_out, d, BIAS, EACH, TOKENS, WIDTH)
    else:
        source = v + (head - heads - groups) * v_head + half * d
        _copy_kernel(source, out, sums, tokens, batch, v_s, v_b, stride_out, d, BIAS, EACH, TOKENS, WIDTH)


def _even(x: torch.Tensor) -> bool:
    """Whether the tokens of x [s, b, n] have one stride, so that a view [s b, n] exists."""
    s, b, _ = x.shape
    return s == 1 or b == 1 or x.stride(0) == b * x.stride(1)


def _launch(
    parts: Sequence[torch.Tensor], out: torch.Tensor, turns: Turns | None, *, summed: bool = False, back: bool = False
) -> torch.Tensor | None:
    """Write one to three `parts` [s, b, heads, d], of any strides, side by side into `out` [s, b, all heads d], which is `_even`.

    The first two are rotated, with back by the opposite angle. summed: return the sum over tokens, float32 [all heads d].
    """
    parts = [x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in parts]
    s, b, heads, d = parts[0].shape
    slots = sum(x.shape[2] for x in parts)
    if out.numel() == 0:
        return out.new_zeros(out.shape[2], dtype=torch.float32) if summed else None
    q, k, v = (*parts, parts[0], parts[0])[:3]
    pairs, halves, places = 1, 1, q
    if turns is not None:
        pairs, halves = turns.pairs, max(1, len(turns.places))
        if turns.places:
            places = turns.places[0].contiguous() if halves == 1 else torch.stack(turns.places)
    each_d = d // halves
    width = next_power(each_d)
    tokens_each = max(1, TILE // width)
    chunks, count = -(-s * b // tokens_each), slots * halves
    # With sums, eight programs for each multiprocessor: all run at once, and the partial sums stay few.
    each = max(1, chunks * count // (8 * multiprocessors(out.device))) if summed else 1
    programs = -(-chunks // each)
    sums = torch.empty(programs, slots * d, dtype=torch.float32, device=out.device) if summed else out
    rest = each_d - 2 * pairs if turns is not None else 0
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    _heads_kernel[(programs, count)](
        q, k, v, out, q if turns is None else turns.cos, q if turns is None else turns.sin, places, sums, s * b, b, heads,
        parts[1].shape[2] if len(parts) > 1 else 0, each_d, pairs, *strides, out.stride(1) if b > 1 else out.stride(0),
        TURN=turns is not None, PLACES=turns is not None and bool(turns.places), HALVES=halves, BACK=back,
        INTERLEAVED=turns is not None and turns.interleaved, BIAS=summed, EACH=each, TOKENS=tokens_each, WIDTH=width,
        PAIRS=next_power(pairs), REST=max(2, next_power(rest)) if rest else 1,
    )  # fmt: skip
    return sums.sum(0) if summed else None
