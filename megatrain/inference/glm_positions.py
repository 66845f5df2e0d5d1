"""GLM: from the tokens of a prompt, the positions of each token and the length of part A, which all tokens see.

    text ... [gMASK] <sop> answer ...       part A ends before <sop>; part B begins with it and fills the blank

    dim 1    0 1 2 ... c - 1 | m m m m      m: place of [gMASK], or of [MASK] if there is none; c: place of <sop>
    dim 2    0 0 0 ... 0     | 1 2 3 4

With one-dimensional positions (GLM-130B), tokens that fill a [gMASK] count on from c, and those that fill a [MASK] stay at m. Training
batches come with positions and lengths (`data/samples/glm.py`); the model itself is that of `models/gpt.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Marks:
    """Ids of the tokens <sop>, [gMASK] and [MASK], which determine positions."""

    sop: int
    gmask: int
    mask: int


@dataclass(frozen=True)
class Places:
    """Positions of b prompts of s tokens."""

    positions: torch.Tensor
    """[b, s] positions in the text."""
    block_positions: torch.Tensor
    """[b, s] positions within the blank; 0 in part A."""
    sep: torch.Tensor
    """[b] number of tokens in part A."""


def places_of(tokens: torch.Tensor, marks: Marks, two_dimensional: bool) -> Places:
    """Positions of the tokens [b, s] of prompts. A prompt without <sop> is all part A."""
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
    """Positions of tokens [b, s] that are read from left to right, without blanks: part A has 0 tokens."""
    index = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    return Places(index, torch.zeros_like(index), torch.zeros_like(index[:, 0]))


def _first(where: torch.Tensor) -> torch.Tensor:
    """For each row of [b, s]: the first place where it is true, s if none; [b]."""
    return torch.where(where.any(1), where.int().argmax(1), where.shape[1])
