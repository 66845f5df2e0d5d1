"""Masked and biased attention on GPUs: torch's FlexAttention, which compiles one fused kernel a kind of mask and skips empty blocks.

The mask is never dense: FlexAttention asks `_visible` for blocks of 128 x 128 (Dong et al., arXiv:2412.05496).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megatrain.kernels.attention_mask import AttentionMask

SMALLEST_HEAD = 16
"""Smallest head dim d of FlexAttention's kernels: Triton multiplies no narrower tiles."""


def takes(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether FlexAttention's GPU kernels support q [s, b, a, d] and k [n, b, g, d]."""
    return len(q) == len(k) and q.shape[-1] >= SMALLEST_HEAD and q.dtype != torch.float64


def flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttentionMask, slopes: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention under a mask, with ALiBi if `slopes` [a] are given: q [s, b, a, d], k and v [s, b, g, d] -> [s, b, a d]."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    blocks = _static_blocks(mask, q.shape[2], q.device) if mask.uniform else _blocks_of(mask, q)
    function = _function(q.device.type)
    bias = None if slopes is None else _alibi(slopes)
    y = function(q, k, v, score_mod=bias, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
    return y.permute(2, 0, 1, 3).flatten(2)


@cache
def _function(device_type: str) -> Any:
    """FlexAttention: compiled on a GPU; elsewhere torch's reference, which computes all s x s scores, for tests."""
    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


@cache
def _make_blocks(device_type: str) -> Any:
    """torch's function that makes block masks, compiled on a GPU, where it then needs no mask [b, s, s] in memory."""
    return torch.compile(create_block_mask) if device_type == "cuda" else create_block_mask


def _alibi(slopes: torch.Tensor) -> Callable[..., torch.Tensor]:
    def add(score: torch.Tensor, _b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return score - slopes[h] * (k - q).abs()

    return add


@lru_cache(maxsize=16)
def _static_blocks(mask: AttentionMask, length: int, device: torch.device) -> BlockMask:
    """Block mask of a mask that is the same for all sequences; made once and kept."""
    return _make_blocks(device.type)(_visible(mask), None, None, length, length, device=device)


_latest: list[tuple[AttentionMask, BlockMask]] = []
"""Block masks of the current micro-batches, kept because every layer asks for the same one."""


def _blocks_of(mask: AttentionMask, q: torch.Tensor) -> BlockMask:
    """Block mask of a batch with documents or prefixes, made for q [b, a, s, d]."""
    for known, blocks in _latest:
        if known is mask:
            return blocks
    made = _make_blocks(q.device.type)(_visible(mask), q.shape[0], None, q.shape[2], q.shape[2], device=q.device)
    _latest.append((mask, made))
    del _latest[:-16]
    return made


def _visible(mask: AttentionMask) -> Callable[..., torch.Tensor]:
    """The mask as a function of (sequence, head, query, key)."""

    def visible(b: torch.Tensor, _h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        prefix = None if mask.prefix is None else (mask.prefix[b] if mask.prefix.dim() == 1 else mask.prefix[q, b])
        seen = mask.sees(q, k, prefix)
        if mask.documents is not None:
            seen = seen & (mask.documents[q, b] == mask.documents[k, b])
        return seen

    return visible
