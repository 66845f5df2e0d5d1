"""Which keys a query may see, as one value that every attention kernel reads.

    causal     no key after the query
    window     of w: the query's own key and the w - 1 before it (sliding window: Longformer, arXiv:2004.05150; Mistral 7B,
               arXiv:2310.06825)
    sparse     blocks of tokens: a query sees its own block and some before it (local), and the first ones of the text (global)
               (Child et al., arXiv:1904.10509; BigBird, arXiv:2007.14062, section 2)
    documents  only keys of the query's own document, where several are packed in one sequence
    prefix     the first keys are seen by all queries, also by earlier ones (GLM, arXiv:2103.10360, section 2.1: part A is seen by all
               of the text, part B from left to right); with documents, those of the query's own document

They hold together: a key is seen if all of them allow it. A batch says its documents and prefixes, a layer its window and blocks.
Kernels ask for `spans`, the keys that a block of queries may see at all, and for `allowed`, the exceptions inside. A dense
mask of a whole sequence is never made.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class BlockSparse:
    """A sparse mask of local and global blocks of tokens."""

    block: int
    """Number of tokens in a block."""
    local_blocks: int
    """Number of last blocks that a query sees, its own included."""
    global_blocks: int
    """Number of first blocks that all queries see."""


@dataclass(frozen=True)
class AttentionMask:
    """An attention mask: the conjunction of its parts. All but `documents` and `prefix` are the same for every sequence."""

    causal: bool = True
    window: int | None = None
    sparse: BlockSparse | None = None
    documents: torch.Tensor | None = None
    """[s, b] int64 number of each token's document, not falling along the sequence."""
    prefix: torch.Tensor | None = None
    """[b] int64 number of first keys that every query sees; or [s, b] the place before which a query at each place sees all keys."""
    on_host: AttentionMask | None = field(default=None, compare=False, repr=False)
    """This mask with its tensors in host memory, from which `spans` are read without waiting for the device; None: read from this one."""

    _narrowed: dict[tuple[Any, Any], AttentionMask] = field(default_factory=dict, init=False, compare=False, repr=False)

    def within(self, window: int | None, sparse: tuple[int, int, int] | None = None) -> AttentionMask:
        """This mask in a layer with a window or with sparse blocks (tokens of a block, local blocks, global blocks).

        Layers with equal arguments get the same object: kernels cache what they derive from a mask by its identity.
        """
        if window is None and sparse is None:
            return self
        if (window, sparse) not in self._narrowed:
            blocks = None if sparse is None else BlockSparse(*sparse)
            self._narrowed[window, sparse] = replace(self, window=window, sparse=blocks)
        return self._narrowed[window, sparse]

    @property
    def only_causal(self) -> bool:
        """Whether the mask is causal and nothing else."""
        return self.causal and self.uniform and self.window is None and self.sparse is None

    @property
    def uniform(self) -> bool:
        """Whether the mask is the same for every sequence."""
        return self.documents is None and self.prefix is None

    @property
    def _asked(self) -> AttentionMask:
        """The mask whose `documents` and `prefix` are read on the host: `on_host` if there is one."""
        return self if self.on_host is None else self.on_host

    def spans(self, start: int, end: int, keys: int) -> list[slice]:
        """Ranges of the keys, out of 0 .. keys - 1, that any of the queries start .. end - 1 may see: disjoint, ascending."""
        first, last = 0, self._last(start, end, keys)
        if self.window is not None:
            first = max(0, start - self.window + 1)
            if not self.causal:
                last = min(keys, end + self.window - 1)
        documents = self._asked.documents
        if documents is not None:
            first = max(first, _first_of_document(documents, start))
        if self.sparse is None:
            return [slice(first, last)]
        block = self.sparse.block
        near = max(first, (start // block - self.sparse.local_blocks + 1) * block)
        everywhere = min(self.sparse.global_blocks * block, last)
        if near <= everywhere:
            return [slice(first, last)]
        return [span for span in (slice(first, everywhere), slice(near, last)) if span.start < span.stop]

    def _last(self, start: int, end: int, keys: int) -> int:
        """One past the last key that any of the queries start .. end - 1 may see."""
        if not self.causal:
            return keys
        prefix = self._asked.prefix
        if prefix is None:
            return end
        of = prefix if prefix.dim() == 1 else prefix[start:end]
        return min(keys, max(end, int(of.max())))

    def seen_by_all(self, start: int) -> int:
        """Number of first keys that every query from position `start` on sees, in every sequence."""
        if self.window is not None or self.sparse is not None or self.documents is not None or not self.causal:
            return 0
        prefix = self._asked.prefix
        common = 0 if prefix is None or prefix.dim() > 1 else int(prefix.min())
        return max(start, common)

    def sees(self, q: torch.Tensor, k: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
        """Whether queries at places `q` may see keys at places `k`, documents aside: bool, of their broadcast shape.

        prefix: each query's number of first keys seen, of a shape that broadcasts with `q`.
        """
        seen = k <= q if self.causal else (k - q) == (k - q)
        if prefix is not None:
            seen = seen | (k < prefix)
        if self.window is not None:
            seen = seen & ((q - k).abs() < self.window)
        if self.sparse is not None:
            near = q // self.sparse.block - k // self.sparse.block < self.sparse.local_blocks
            seen = seen & (near | (k < self.sparse.global_blocks * self.sparse.block))
        return seen

    def allowed(self, queries: torch.Tensor, keys: torch.Tensor, sequences: torch.Tensor | None = None) -> torch.Tensor:
        """Whether each of `queries` [q] may see each of `keys` [k], both places in the sequence: bool [q, k].

        Where it is not uniform [n, q, k], for each of `sequences` [n] (default: all).
        """
        if self.uniform:
            return self.sees(queries[:, None], keys[None, :])
        of = slice(None) if sequences is None else sequences
        prefix = (
            None
            if self.prefix is None
            else (self.prefix[of, None] if self.prefix.dim() == 1 else self.prefix[queries][:, of].t())
        )
        seen = self.sees(queries[:, None], keys[None, :], None if prefix is None else prefix[:, :, None])
        if self.documents is None:
            return seen
        documents = self.documents[:, of]
        return seen & (documents[queries].t()[:, :, None] == documents[keys].t()[:, None, :])


CAUSAL = AttentionMask()


def _first_of_document(documents: torch.Tensor, start: int) -> int:
    """Least first position, over all sequences, of the document that contains position `start`."""
    return int((documents[: start + 1] < documents[start]).sum(0).min())


def keys_seen(mask: AttentionMask, length: int) -> float:
    """Mean number of keys that a query of a sequence of `length` sees, documents aside; its own key counts half, as in s/2."""
    places = torch.linspace(0, length - 1, min(length, 512)).round().long()
    return float(mask.allowed(places, torch.arange(length)).sum(1, dtype=torch.float64).mean()) - 0.5
