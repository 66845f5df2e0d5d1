"""What GLM models read off the tokens of a prompt: how much of it all may see, and where each token stands.

    text ... [gMASK] <sop> answer ...       part A ends before <sop>; part B begins with it and fills the blank

    dim 1    0 1 2 ... c - 1 | m m m m      m: the place of [gMASK], else of [MASK]; c: that of <sop>
    dim 2    0 0 0 ... 0     | 1 2 3 4

In one dimension (GLM-130B) what follows a [gMASK] counts on from c, and what fills a [MASK] stays at m. Training batches come with all
of this (`data/samples/glm.py`); the model itself is `gpt.py`'s, under a config.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Marks:
    """Ids of the tokens that shape a prompt."""

    sop: int
    gmask: int
    mask: int


@dataclass(frozen=True)
class Places:
    """Of b prompts of s tokens."""

    positions: torch.Tensor
    """[b, s]."""
    block_positions: torch.Tensor
    """[b, s]."""
    sep: torch.Tensor
    """[b] tokens of part A."""


def places_of(tokens: torch.Tensor, marks: Marks, two_dimensional: bool) -> Places:
    """Where the tokens [b, s] of prompts stand. A prompt without <sop> is part A from end to end."""
    b, s = tokens.shape
    index = torch.arange(s, device=tokens.device).expand(b, s)
    sep = _first(tokens == marks.sop)
    gmask, mask = _first(tokens == marks.gmask), _first(tokens == marks.mask)
    has_gmask = gmask < s
    blank = torch.where(has_gmask, gmask, mask).clamp_max((sep - 1).clamp_min(0))
    after = index >= sep[:, None]
    inside = torch.where(after, index - sep[:, None] + 1, 0)
    stays = torch.where(after, blank[:, None], index)
    positions = stays if two_dimensional else torch.where(has_gmask[:, None], index, stays)
    return Places(positions, inside, sep)


def causal_places(tokens: torch.Tensor) -> Places:
    """Places of tokens [b, s] that are read from left to right."""
    index = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    return Places(index, torch.zeros_like(index), torch.zeros_like(index[:, 0]))


def _first(where: torch.Tensor) -> torch.Tensor:
    """[b] first place of a row where it holds, of [b, s]; s where there is none."""
    return torch.where(where.any(1), where.int().argmax(1), where.shape[1])
