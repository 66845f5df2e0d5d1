"""Parts of a text by their hashes, and the types of the arrays that rules loop over."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatrain.corpus.words import Extents, Text, hash_of, jit

Codes = npt.NDArray[np.uint32]
Letters = npt.NDArray[np.uint16]
Hashes = npt.NDArray[np.uint64]
Where = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Slots = npt.NDArray[np.int32]


@jit
def hash_all(codes: Codes, starts: Where, ends: Where, hashes: Hashes) -> None:
    """Fill in the hash of each part of a text."""
    for i in range(len(starts)):
        hashes[i] = hash_of(codes, starts[i], ends[i])


def hashes_of(codes: Codes, spans: Extents) -> Hashes:
    """The hashes of some parts of a text [parts]."""
    hashes = np.empty(len(spans.starts), np.uint64)
    hash_all(codes, spans.starts, spans.ends, hashes)
    return hashes


def hashes_of_words(words: tuple[str, ...]) -> Hashes:
    """The hashes of single words [words]."""
    ends = np.cumsum([len(word) for word in words])
    return hashes_of(Text.of("".join(words)).codes, Extents(np.concatenate([[0], ends[:-1]]), ends))
