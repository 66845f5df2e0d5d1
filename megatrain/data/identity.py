"""What tells a run's texts from others, wherever they lie: sizes, and a hash of blocks that are spread evenly over each file.

A store of any size costs the reading of 5 MiB at most, a small one is read whole. Another text, other answers or another tokenizer are
noticed; a few tokens changed in the midst of a large store may not be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from megatrain.config.schema import Config, CorpusConfig
from megatrain.data.indexed import store_paths

BLOCKS, BLOCK_BYTES = 128, 2**14
"""Blocks of a file that are read; a file of no more bytes is read whole."""
_INDEX_BYTES = 2**20
"""Of the beginning of an index, which has a hash of its own: all that releases before had of a store, besides its sizes."""


def identity_of(config: Config) -> dict[str, Any]:
    """What the texts and the tokenizer of a config are, as plain JSON. Raises OSError."""
    data = config.data
    return {
        "data": [_corpus_identity(corpus) for corpus in data.train],
        "valid": [[corpus.set, store_identity(corpus.path)] for corpus in data.valid],
        "tokenizer": data.tokenizer if data.tokenizer in (None, "bytes") else _hash_of(Path(data.tokenizer).read_bytes()),
    }


def _corpus_identity(corpus: CorpusConfig) -> list[Any]:
    """[text, weight], and the answers where there are such."""
    return [store_identity(corpus.path), corpus.weight, *([] if corpus.answers is None else [store_identity(corpus.answers)])]


def store_identity(prefix: str | Path) -> str:
    """Bytes of index and tokens, hash of the beginning of the index, hash of what `sampled` has of both."""
    tokens, index = store_paths(prefix)
    with index.open("rb") as file:
        beginning = file.read(_INDEX_BYTES)
    hashes = _hash_of(beginning), _hash_of(sampled(index) + sampled(tokens))
    return f"{index.stat().st_size}-{tokens.stat().st_size}-{hashes[0]}-{hashes[1]}"


def sampled(path: Path) -> bytes:
    """A small file, or the blocks of a large one: the first, the last, and others evenly between."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= BLOCKS * BLOCK_BYTES:
            return file.read()
        blocks = []
        for number in range(BLOCKS):
            file.seek(number * (size - BLOCK_BYTES) // (BLOCKS - 1))
            blocks.append(file.read(BLOCK_BYTES))
    return b"".join(blocks)


def _hash_of(data: bytes) -> str:
    return str(xxhash.xxh3_128_hexdigest(data))


def same_store(was: str, now: str) -> bool:
    """Whether a store is the one that it was, as far as the older of two identities tells: it may lack the last hash."""
    parts = was.split("-")
    return now.split("-")[: len(parts)] == parts


def other_corpora(was: Sequence[Sequence[Any]], now: Sequence[Sequence[Any]], corpora: Sequence[CorpusConfig]) -> Iterator[str]:
    """What is another in training data: identities of before and of now, and where the corpora of now lie."""
    if len(was) != len(now):
        yield f"data.train has {len(now)} corpora, and had {len(was)}"
        return
    for number, (before, after, corpus) in enumerate(zip(was, now, corpora, strict=True)):
        name = f"data.train[{number}]"
        if not same_store(before[0], after[0]):
            yield f"{name}={corpus.path} is another text: {before[0]} -> {after[0]}"
        if before[1] != after[1]:
            yield f"{name}.weight: {before[1]} -> {after[1]}"
        if before[0].count("-") == after[0].count("-"):  # older releases did not look at answers
            then, here = (row[2] if len(row) > 2 else None for row in (before, after))
            if then != here:
                yield f"{name}.answers={corpus.answers} are others: {then} -> {here}"


def other_judged(was: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> bool:
    """Whether held-out texts are others than they were."""
    return len(was) != len(now) or any(a[0] != b[0] or not same_store(a[1], b[1]) for a, b in zip(was, now, strict=True))
